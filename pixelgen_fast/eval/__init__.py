"""What a run looks like and how good it is: sample grids, loss curves, digit classification, Fréchet distances, FID."""
