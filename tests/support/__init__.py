"""What tests of several rooms share: reference numbers, small models and teachers, commands, ranks, gradients."""
