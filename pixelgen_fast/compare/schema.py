"""What a comparison runs: one base configuration, a teacher, a decoder, seeds, and variants that change the base.

A section of a variant is merged into that of the base; a `model` that names a system replaces it. Text values may hold
{teacher}, {decoder} and {statistics}, what the comparison makes first: the teacher, the decoder of its tokens, and the
mean and variance of these.

<dir>/<variant>/seed<n>/            the run, with judged/<nimg>.json of each checkpoint that was kept
      teacher/teacher, decoder/decoder, decoder/latents.safetensors
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pixelgen_fast import config as cfg
from pixelgen_fast.config import ConfigError
from pixelgen_fast.decoding.schema import LATENTS
from pixelgen_fast.models import model_schema
from pixelgen_fast.overrides import merge, read_layers
from pixelgen_fast.runs.folder import RunFolder

PREPARED = ("teacher", "decoder")
JUDGED = "judged"


@dataclass
class Quick:
    """What `--quick` changes, to see every part of the comparison run within minutes."""

    seeds: list[int] = field(default_factory=lambda: [0])
    samples: int = 200
    settings: dict[str, Any] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)


@dataclass
class Compare:
    # where the runs, the teacher and the page go; the same folder again goes on
    dir: str = "runs/compare"
    # the configuration that every variant starts from, and those of the teacher and the decoder of latents (null: no
    # variant needs one)
    base: str = "configs/digits.yaml"
    teacher: str | None = None
    decoder: str | None = None
    # settings on top of these files, by "teacher" and "decoder"
    prepared: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    # generated images that a run is judged by
    samples: int = 1000
    # sections that are the same for all variants, on top of the base
    settings: dict[str, Any] = field(default_factory=dict)
    # sections of each variant by its name; the first is what the others are compared with
    variants: dict[str, Any] = field(default_factory=dict)
    quick: Quick = field(default_factory=Quick)


def load(path: str | Path, overrides: Iterable[str] = (), *, quick: bool = False) -> Compare:
    """Read a comparison, apply overrides, check it and the configuration of every variant.

    Raises ConfigError naming the file, the key or the variant.
    """
    compare: Compare = merge(Compare, read_layers(path, overrides))
    if quick:
        quick = compare.quick
        settings, prepared = (
            OmegaConf.to_container(OmegaConf.merge(own, short))
            for own, short in ((compare.settings, quick.settings), (compare.prepared, quick.prepared))
        )
        compare = replace(compare, seeds=quick.seeds, samples=quick.samples, settings=settings, prepared=prepared)
    if not compare.variants or not compare.seeds or len(set(compare.seeds)) < len(compare.seeds):
        raise ConfigError(f"{path}: give at least one variant and one seed, each seed once; seeds {compare.seeds}")
    if len({slug(name) for name in compare.variants}) < len(compare.variants):
        raise ConfigError(f"{path}: two variants have the same letters and digits in their names; rename one")
    for name in compare.variants:
        run_config(compare, name, compare.seeds[0])
        if lacking := [what for what in needs(compare, name) if getattr(compare, what) is None]:
            raise ConfigError(f"{path}: variant {name!r} names {{{lacking[0]}}}, and `{lacking[0]}` names no file")
    return compare


def slug(name: str) -> str:
    """A variant's name as a folder's: lower-case letters and digits, joined by single underscores."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def run_folder(compare: Compare, variant: str, seed: int) -> Path:
    return Path(compare.dir) / slug(variant) / f"seed{seed}"


def prepared_folder(compare: Compare, what: str) -> Path:
    """The run folder of the "teacher" or the "decoder"; what it made is its subfolder of the same name."""
    return Path(compare.dir) / what


def places(compare: Compare) -> dict[str, str]:
    """What {teacher}, {decoder} and {statistics} stand for."""
    folders = {what: str(prepared_folder(compare, what) / what) for what in PREPARED}
    return folders | {"statistics": str(prepared_folder(compare, "decoder") / LATENTS)}


def needs(compare: Compare, variant: str) -> tuple[str, ...]:
    """What of that which is trained first a variant's settings name."""
    text = str(compare.variants[variant])
    return tuple(what for what in PREPARED if f"{{{what}}}" in text)


def judgements(folder: Path) -> dict[int, Path]:
    """The judgements of a run's checkpoints, by their images, the last that of its end."""
    found = {int(path.stem): path for path in (folder / JUDGED).glob("*.json") if path.stem.isdecimal()}
    whole = RunFolder(folder).evaluation
    if whole.is_file():
        found[json.loads(whole.read_text())["settings"]["nimg"]] = whole
    return dict(sorted(found.items()))


def run_config(compare: Compare, variant: str, seed: int) -> cfg.Config:
    """The configuration of one run. Raises ConfigError that names the variant."""
    base = OmegaConf.to_container(OmegaConf.load(compare.base))
    sections = fill(compare.variants[variant] or {}, places(compare))
    if "system" in sections.get("model", {}):
        base.pop("model")
    own = {"run": {"dir": str(run_folder(compare, variant, seed)), "seed": seed}}
    layers = [(f"variant {variant!r} of {compare.base}", part) for part in (base, compare.settings, sections, own)]
    return cfg.from_layers([(origin, OmegaConf.create(part)) for origin, part in layers], model_schema)


def fill(value: Any, names: dict[str, str]) -> Any:
    """Settings in which text that holds {name} has what the name stands for."""
    if isinstance(value, dict):
        return {key: fill(part, names) for key, part in value.items()}
    if not isinstance(value, str):
        return copy.deepcopy(value)
    for name, text in names.items():
        value = value.replace(f"{{{name}}}", text)
    return value
