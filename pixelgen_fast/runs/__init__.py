"""What lies on disk: the folder of a run, its checkpoints, exported models, and drawing with any of them."""
