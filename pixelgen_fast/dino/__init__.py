"""DINO: its networks and weights, the frozen teacher, the student that reads noised images, and the kept copy."""
