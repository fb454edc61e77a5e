"""A copy of an autoencoder, which reads neither the files nor the hub that it came from.

encoder/       the network and its weights, as a folder that load_dino reads
decoder/       as save_decoder writes it
statistics     the file as it was
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pixelgen_fast import hub
from pixelgen_fast.config import Config
from pixelgen_fast.rae.encoder import copy_encoder, load_encoder
from pixelgen_fast.rae.files import load_decoder, save_decoder

# the settings of the section `model` that say where its parts are, and their places in a copy
PLACES = {"encoder_weights": "encoder", "decoder": "decoder", "statistics": "statistics"}


def copy_autoencoder(config: Config, folder: Path) -> None:
    """Copy what a configuration's model names into a folder. Raises ValueError for a part that cannot be read."""
    model = config.model
    encoder, decoder, statistics = (folder / place for place in PLACES.values())
    copy_encoder(model.encoder, model.encoder_weights, encoder)
    if model.decoder is not None:
        # with the mean and deviation of its pixels, which a published file does not have
        part = load_encoder(
            model.encoder, str(encoder), config.data.image_size // model.patch_size, model.encoder_layers
        )
        save_decoder(decoder, load_decoder(model.decoder, None if part.layers else part.channels), {})
    if model.statistics is not None:
        shutil.copyfile(hub.local(model.statistics), statistics)
