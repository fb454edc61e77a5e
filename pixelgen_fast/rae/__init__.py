"""RAE: a frozen encoder's tokens as the latent of a generator, and a decoder that turns them into pixels again.

Representation autoencoders (arXiv 2510.11690): encoder.py, decoder.py, the two of them in autoencoder.py, the
discriminator of the decoder's training in discriminator.py, published weights in names.py.
"""
