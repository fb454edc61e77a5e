"""Weights out of a run, to the hub, and published ones in: `pixelgen export`, `pixelgen push`, `pixelgen import`.

Like those of commands.py, each returns its exit code, and imports what is heavy by itself.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pixelgen_fast import config as cfg
from pixelgen_fast import errors, hub
from pixelgen_fast.atomic import replaced

if TYPE_CHECKING:
    from pixelgen_fast.runs.draw import Generator

RAE_DECODER = "rae_decoder"  # of import, beside the systems
_PARTS = ("tokenizer",)  # options of the import command that name further files


def export(args: argparse.Namespace) -> int:
    import torch

    from pixelgen_fast.decoding.judge import decoder_folder
    from pixelgen_fast.interop.licences import of_published
    from pixelgen_fast.rae.files import publish_decoder
    from pixelgen_fast.runs import draw, export
    from pixelgen_fast.runs.weight_files import model_files, size_of
    from pixelgen_fast.share.diffusers import export_diffusers

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    if (folder := decoder_folder(args.run)) is not None:
        if args.weights is not None:
            raise errors.InputError(f"--weights {args.weights}: {folder} holds one average alone; leave it out")
        print(f"{publish_decoder(folder, Path(args.out), dtype)}: a decoder under the published names ({args.dtype})")
        return 0
    limit = size_of(args.shard_size)
    loaded = draw.load(args.run, args.weights)
    model = loaded.model.to(dtype)
    out = Path(args.out)
    if args.format == "public":
        return _export_public(loaded, out)
    if args.format == "diffusers":
        print(f"{out} ({loaded.weights}, {args.dtype}); open it with {export_diffusers(out, loaded, limit)}")
    else:
        about = (loaded.config, loaded.classes, loaded.weights, loaded.nimg, loaded.published)
        export.export(out, model.state_dict(), *about, limit)
        draw.load(out)
        print(f"{out}: {model_files(out)} ({loaded.weights}, {args.dtype}) and config.json, read back")
    print("".join(f"{of_published(name).line()}\n" for name in loaded.published), end="")
    return 0


def push(args: argparse.Namespace) -> int:
    import torch

    from pixelgen_fast.decoding.judge import decoder_folder
    from pixelgen_fast.runs import draw
    from pixelgen_fast.runs.weight_files import size_of
    from pixelgen_fast.share import push

    repo, limit = hub.check_repo(args.repo), size_of(args.shard_size)
    if hub.is_hub_name(args.run):
        raise errors.InputError(f"{args.run}: is on the hub already; name a run, or a folder of pixelgen export")
    if decoder_folder(args.run) is not None:
        raise errors.InputError(f"{args.run}: is a decoder, which pixelgen push has no card for; push a generator")
    loaded = draw.load(args.run, args.weights)
    if args.dtype is not None:
        loaded.model.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    with tempfile.TemporaryDirectory() as work:
        out = Path(args.out) if args.out else Path(work) / "model"
        said = push.write(loaded, Path(args.run), repo, out, args.format, limit, args.license)
        if args.out:
            print(f"{out}: {said}; nothing was pushed")
        else:
            print(f"{push.push(out, repo, args.format, loaded.nimg, args.private)}: {said}")
    return 0


def _export_public(loaded: Generator, out: Path) -> int:
    """Write the weights alone, under their public names, in the format of torch."""
    import torch

    from pixelgen_fast import interop

    if out.exists():
        raise errors.InputError(f"{out}: exists; choose another file or remove it")
    c = loaded.config
    system, size = c.model.system, c.data.image_size
    state = interop.to_public(system, loaded.model.state_dict(), c.model, size)
    wanted = interop.settings(system, c.model, size).get("objective", {}).get("predict", "v")
    if c.objective.predict != wanted:
        raise errors.InputError(
            f"objective.predict is {c.objective.predict}, and a published {system} predicts {wanted}: its code would "
            "take these weights for something else"
        )
    with replaced(out) as work:
        torch.save(state, work)
    print(f"{out}: {len(state)} tensors ({loaded.weights}) under their public names")
    return 0


def import_published(args: argparse.Namespace) -> int:
    if args.system == RAE_DECODER:
        return _import_decoder(args)
    if args.encoder or args.encoder_weights or args.layers:
        raise errors.InputError(f"--encoder and its weights and layers are of --system {RAE_DECODER}; leave them out")
    from pixelgen_fast import interop, models
    from pixelgen_fast.runs import draw, export

    weights = args.weights or interop.default_kind(args.system)
    published = interop.read_published(hub.local(args.file), args.system, weights)
    state, model, num_classes = interop.native(args.system, published)
    files = {name: getattr(args, name) for name in _PARTS if getattr(args, name) is not None}
    model, of_parts = interop.with_parts(args.system, model, files)
    trained_at = interop.image_size(args.system, published) or of_parts
    if None not in (trained_at, args.image_size) and trained_at != args.image_size:
        raise errors.InputError(
            f"--image-size {args.image_size}: {args.file} was made for {trained_at} pixels; leave it out"
        )
    image_size = trained_at or args.image_size or 256
    values = {
        "model": vars(model),
        "data": {"image_size": image_size, "num_classes": num_classes, "root": export.IMPORTED},
        **interop.settings(args.system, model, image_size),
    }
    config = cfg.from_dict(values, models.model_schema, args.overrides)
    classes = [str(i) for i in range(num_classes)]
    export.export(Path(args.out), state, config, classes, weights, 0, [args.system])
    draw.load(args.out)
    print(f"{args.out}: {len(state)} tensors of {args.file}; draw with pixelgen sample {args.out}")
    return 0


def _import_decoder(args: argparse.Namespace) -> int:
    from pixelgen_fast.rae.autoencoder import import_decoder

    given = [("--image-size", args.image_size), ("--weights", args.weights), ("--tokenizer", args.tokenizer)]
    for option, value in [*given, ("settings", " ".join(args.overrides) or None)]:
        if value is not None:
            raise errors.InputError(f"{option} {value}: no part of a {RAE_DECODER}, whose file tells it; leave it out")
    encoder = args.encoder or "vit_base_patch14_reg4_dinov2.lvd142m"
    rae = import_decoder(str(hub.local(args.file)), Path(args.out), encoder, args.encoder_weights, args.layers or ())
    print(
        f"{args.out}: decoder of {list(rae.latent_shape)} latents of {encoder}, to {rae.decoder.image_size} pixels; "
        f"judge it with pixelgen evaluate {args.out} --reference IMAGES"
    )
    return 0
