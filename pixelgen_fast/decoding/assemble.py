"""From a decoder's configuration to the parts of its run: device and ranks, data set, networks, the engine of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pixelgen_fast import config as cfg
from pixelgen_fast.data.roots import open_root
from pixelgen_fast.decoding.objective import DecoderObjective
from pixelgen_fast.decoding.pair import PairEngine
from pixelgen_fast.decoding.perceptual import Perceptual
from pixelgen_fast.decoding.schema import ENCODER, DecoderConfig
from pixelgen_fast.engine import group
from pixelgen_fast.engine.assemble import Parts, describe_operators, join_ranks, resolve_device
from pixelgen_fast.engine.heartbeat import Heartbeat
from pixelgen_fast.engine.memory import keep_freed_memory
from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.errors import InputError
from pixelgen_fast.rae.decoder import Decoder
from pixelgen_fast.rae.discriminator import load_discriminator
from pixelgen_fast.rae.encoder import Encoder, load_encoder
from pixelgen_fast.rae.files import load_decoder
from pixelgen_fast.runs import checkpoint
from pixelgen_fast.runs.folder import RunFolder


def assemble(config: DecoderConfig, heart: Heartbeat) -> Parts:
    """Join the processes of a run and build its parts. heart: of this rank.

    Raises UserError for settings, weights and data that do not fit, FileNotFoundError for a missing root.
    """
    device, precision = resolve_device(config)
    if device.type == "cpu":
        keep_freed_memory()
    device, rank, world = join_ranks(config, device, heart, group.join)
    cfg.check_world(config, world)
    folder = RunFolder(Path(config.run.dir))
    heart.at("reading the data set")
    index = open_root(config.data.root, expected_classes=config.data.num_classes)

    heart.at("building the networks")
    built = with_kept_encoder(config, folder)
    e = built.encoder
    encoder = load_encoder(e.network, e.weights, config.grid, e.layers)
    decoder = build_decoder(config, encoder)
    flops = 3 * forward_flops(decoder)
    operators = describe_operators(device, precision, config.decoder.hidden_size // config.decoder.num_heads)
    objective = DecoderObjective(config, encoder, decoder, *_judges(config), precision).to(device)
    engine = PairEngine(objective.decoder, objective.discriminator, config.optimizer)
    return Parts(config, built, folder, device, precision, rank, world, index, operators, flops, objective, engine)


def with_kept_encoder(config: DecoderConfig, folder: RunFolder) -> DecoderConfig:
    """The configuration with the copy of the encoder that a run has kept, once the run has a checkpoint."""
    kept = folder.root / ENCODER
    if not (kept.is_dir() and checkpoint.checkpoints(folder.checkpoints)):
        return config
    return replace(config, encoder=replace(config.encoder, weights=str(kept)))


def build_decoder(config: DecoderConfig, encoder: Encoder) -> Decoder:
    """A fresh decoder, a function of run.seed, or the one that run.init names.

    Its pixels have the mean and deviation of the encoder's, of RAEv2's, whose latents are means of layers, none.
    Raises InputError for a decoder of another size.
    """
    channels = () if encoder.layers else encoder.channels
    if config.run.init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            return Decoder(config.decoder, encoder.width, config.grid, *channels)
    decoder = load_decoder(config.run.init, channels or None)
    wanted, found = (config.decoder, encoder.width, config.grid), (decoder.settings, decoder.latent_dim, decoder.grid)
    if found != wanted:
        raise InputError(f"run.init {config.run.init} holds a decoder of {found}; the section decoder says {wanted}")
    return decoder


def _judges(config: DecoderConfig) -> tuple[nn.Module | None, nn.Module | None]:
    """The discriminator and LPIPS, where they have a weight."""
    discriminator = perceptual = None
    if config.objective.gan_weight:
        d = config.discriminator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            discriminator = load_discriminator(d.network, d.weights, d.taps)
    if config.objective.perceptual_weight:
        perceptual = Perceptual(config.objective.vgg)
    return discriminator, perceptual
