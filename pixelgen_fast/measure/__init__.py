"""How good what a model draws is: one set of images, every number; over several settings, a table and a picture."""
