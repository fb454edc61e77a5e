"""Where the time and the memory of a training step go, by part of the model: `pixelgen profile`."""
