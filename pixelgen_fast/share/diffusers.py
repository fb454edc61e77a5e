"""A folder that diffusers opens without this package: weights, settings, and the code that runs them.

<out>/model_index.json         the pipeline's class, the names of the classes, how the model was trained and is drawn
      pipeline.py              noise, solver, guidance      transformer/modeling.py     the network in plain PyTorch
      transformer/config.json  its sizes                    transformer/diffusion_pytorch_model.safetensors

DiffusionPipeline.from_pretrained(out, custom_pipeline=out, trust_remote_code=True) opens it. The two Python files are
those of diffusers_form/, as they are: their images are those of `pixelgen sample` with the same seed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixelgen_fast.config import Sampling
from pixelgen_fast.errors import InputError
from pixelgen_fast.runs.export import take_folder
from pixelgen_fast.runs.folder import DIFFUSERS, PUBLISHED
from pixelgen_fast.runs.weight_files import SHARD_BYTES, save_weights
from pixelgen_fast.settings import refuse_unused

if TYPE_CHECKING:
    from pixelgen_fast.runs.draw import Generator

CODE = Path(__file__).parent / "diffusers_form"
NETWORK, WEIGHTS = "transformer", "diffusion_pytorch_model.safetensors"
# the class in modeling.py of a system, and its settings there
_TRANSFORMER = ("hidden_size", "num_heads", "patch_size")
COVERED = {
    "pixeldit": (
        "PixelDiT",
        (
            *(*_TRANSFORMER, "patch_depth", "pixel_hidden_size", "pixel_depth", "pixel_mlp_ratio"),
            *("post_modulation", "gelu_tanh", "pixel_stream_float32", "registers"),
        ),
    ),
    "jit": ("JiT", (*_TRANSFORMER, "depth", "bottleneck", "context_length", "context_start")),
}
# diffusers takes a setting that has the name of a part for that part
_RENAMED = {"registers": "num_registers"}
# what matters to a backward pass alone
_OF_TRAINING = ("system", "pixel_attention_save", "dropout")


def export_diffusers(out: Path, generator: Generator, limit: int = SHARD_BYTES) -> str:
    """Write the folder of a generator; returns how it is opened. limit: bytes of a file of weights.

    Raises InputError for a system or a setting that modeling.py and pipeline.py do not cover, GeneratorError for a
    folder that holds something.
    """
    config, kind = generator.config, generator.config.model.system
    check_covered(config)
    name, settings = COVERED[kind]
    take_folder(out)
    (out / NETWORK).mkdir()
    sizes = {"image_size": config.data.image_size, "num_classes": len(generator.classes)}
    given = asdict(config.model)
    sizes |= {_RENAMED.get(setting, setting): given[setting] for setting in settings}
    _write(out / NETWORK / "config.json", {"_class_name": name, **sizes})
    save_weights(generator.model.state_dict(), out / NETWORK / WEIGHTS, limit)
    shutil.copyfile(CODE / "modeling.py", out / NETWORK / "modeling.py")
    shutil.copyfile(CODE / "pipeline.py", out / "pipeline.py")
    index = {"_class_name": ["pipeline", "PixelPipeline"], NETWORK: ["modeling", name]}
    _write(out / DIFFUSERS, index | {"settings": _settings(generator)})
    return f'DiffusionPipeline.from_pretrained("{out}", custom_pipeline="{out}", trust_remote_code=True)'


def check_covered(config: Any) -> None:
    """Raise InputError, naming system or setting, for a configuration that the two files do not cover."""
    system, o = config.model.system, config.objective
    if system not in COVERED:
        raise InputError(
            f"model.system {system} has no form for diffusers; {' and '.join(COVERED)} have. The folder that "
            "`pixelgen export` writes without --format is read by pixelgen sample"
        )
    known = {*COVERED[system][1], *_OF_TRAINING}
    refuse_unused(config.model, type(config.model), known, "model.", "an export for diffusers")
    if config.sample.guide is not None:
        raise InputError(f"sample.guide {config.sample.guide}: the form for diffusers holds one model, and no guide")
    if o.path != "linear" and o.predict == "x":
        raise InputError(f"objective.path {o.path} with predict x is drawn by a search that no form for diffusers has")


def _settings(g: Generator) -> dict[str, Any]:
    """What pipeline.py reads, and whose weights these are."""
    used = [f.name for f in fields(Sampling) if f.name in g.model.used_sampling and f.name != "guide"]
    return {
        "classes": g.classes,
        "objective": {name: getattr(g.config.objective, name) for name in ("predict", "noise_scale", "t_eps")},
        "sample": {name: getattr(g.config.sample, name) for name in used},
        "weights": {"kind": g.weights, "images": g.nimg, PUBLISHED: g.published},
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
