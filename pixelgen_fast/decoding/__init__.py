"""Two programs around RAE: the statistics of an encoder's latents, and the training of the decoder back to pixels.

(arXiv 2510.11690.) One configuration serves both: `pixelgen latents CONFIG` and `pixelgen decoder CONFIG`.
"""
