"""Files that are copied into an export for diffusers, and run there: of PyTorch and diffusers alone."""
