"""DINO: its networks and weights, the frozen teacher, and the student that reads noised images."""
