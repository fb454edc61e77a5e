"""Published checkpoints in, and weights out in their form: names, packing and files, and models that keep them.

A published file is converted by renaming keys and packing tensors; the maths is unchanged, and so is the licence of
the weights. A system that has a public form is one module here, under the name of its models/ module, with a PublicForm
(form.py); `layout` has what these modules share.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import PublicLayout, State, check_state
from pixelgen_fast.weights import plain_names, read_file

__all__ = [
    "SYSTEMS",
    "PublicLayout",
    "check_state",
    "default_kind",
    "from_reference",
    "image_size",
    "native",
    "read_published",
    "settings",
    "to_public",
    "with_parts",
]

SYSTEMS = ("pixeldit", "jit", "deco", "ditdh", "raev2", "fractal", "mar", "alitok")

log = logging.getLogger(__name__)


def public(system: str) -> PublicForm:
    """A system's public form. Raises InputError with the valid names for another system."""
    if system not in SYSTEMS:
        raise InputError(f"system: no public layout for {system!r}; valid: {', '.join(SYSTEMS)}")
    return importlib.import_module(f"{__name__}.{system}").FORM


def from_reference(system: str, config: Mapping[str, Any], state_dict: State) -> nn.Module:
    """A model from weights in the published layout, called as the public network: a flow as module(x, t [B], y [B]).

    system: one of SYSTEMS. config: the constructor arguments of the public code plus image_size, as listed in the
    system's PublicForm.config. state_dict: keys without the prefix that they have in the file.
    Raises ValueError for an unknown system or config key, and for missing, extra or misshapen weights, by name.
    """
    form, model = public(system), importlib.import_module(f"pixelgen_fast.models.{system}")
    settings, size, num_classes = form.config(config)
    wanted, fixed = form.public_shapes(settings, size, num_classes), form.fixed(settings, size)
    check_state(state_dict, wanted, fixed)
    return PublicLayout(
        model.build(settings, size, num_classes),
        {name: state_dict[name] for name in wanted},
        lambda state: form.to_native(state, settings),
        fixed,
        form.frozen,
        form.call,
    )


def read_published(path: Path, system: str, weights: str | None = None) -> dict[str, Tensor]:
    """The state dict of a published file, without prefix.

    path: as the public code writes it, or its weights alone, in safetensors or either format of torch; names may have
    what DataParallel and torch.compile add, and lack the prefix. weights: a kind that the system's prefixes name, None
    for the first of them. Where the file has no such weights, the first kind that it has is taken, with a warning.
    Raises FileNotFoundError, or ValueError when the file is not such a checkpoint.
    """
    form = public(system)
    weights = weights or default_kind(system)
    if weights not in form.prefixes:
        raise InputError(f"weights: a {system} file has no {weights!r}; valid: {', '.join(form.prefixes)}")
    found = {kind: state for kind, state in _kinds(read_file(path), form, path).items() if state}
    if not found:
        beginnings = " or ".join(dict.fromkeys(form.prefixes.values()))
        raise InputError(f"{path}: holds no weights whose names begin with {beginnings}")
    if weights not in found:
        there = next(kind for kind in form.prefixes if kind in found)
        log.warning("%s: holds no %s weights; its %s weights are taken", path, weights, there)
        return found[there]
    return found[weights]


def _kinds(content: dict[Any, Any], form: PublicForm, path: Path) -> dict[str, dict[str, Tensor]]:
    """{kind: weights without prefix} of what a file holds. Raises InputError naming the keys that are none."""
    if content and all(isinstance(value, Tensor) for value in content.values()):
        state, prefixes = plain_names(content, str(path)), [*form.prefixes.values()]
        if form.class_table in state:
            return {form.bare: state}
        # prefixes that are one tell nothing of the kind
        own = {kind: state for kind, prefix in form.prefixes.items() if prefixes.count(prefix) == 1}
        sections: dict[str, Any] = own or {"raw": state}
    else:
        try:
            sections = form.read(content, form.prefixes)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
    return {kind: _without_prefix(state, form, kind, path) for kind, state in sections.items()}


def _without_prefix(state: State, form: PublicForm, kind: str, path: Path) -> dict[str, Tensor]:
    """The weights of one kind among those of a state dict."""
    known = (*form.prefixes.values(), *form.ignored)
    named = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if odd := [str(name) for name in state if name not in named]:
        raise InputError(f"{path}: {', '.join(odd[:10])} are no weights by name")
    plain = plain_names(named, str(path))
    if extra := [name for name in plain if not name.startswith(known)]:
        if len(extra) == len(plain):
            beginnings = " or ".join(dict.fromkeys(form.prefixes.values()))
            raise InputError(f"{path}: no key begins with {beginnings}; the first keys are {', '.join(extra[:5])}")
        raise InputError(f"{path}: unknown keys {', '.join(extra[:10])}; expected prefixes {', '.join(known)}")
    prefix = form.prefixes[kind]
    own = {name[len(prefix) :]: value for name, value in plain.items() if name.startswith(prefix)}
    return plain_names(own, str(path))


def default_kind(system: str) -> str:
    """The kind of weights that is taken where none is asked for."""
    return next(iter(public(system).prefixes))


def native(system: str, published: State) -> tuple[dict[str, Tensor], Any, int]:
    """Convert a published state dict: (native weights, model config, number of classes).

    Raises ValueError naming every missing, extra or misshapen weight.
    """
    form = public(system)
    config = form.config_of(published)
    table = published.get(form.class_table)
    num_classes = 1000 if table is None else table.shape[0] - form.no_class(published)
    size = image_size(system, published)
    fixed = {} if size is None else form.fixed(config, size)
    # where the weights do not tell the size of an image, their shapes do not depend on it
    check_state(published, form.public_shapes(config, size or config.patch_size, num_classes), fixed)
    weights = {name: value for name, value in published.items() if name not in fixed}
    return form.to_native(weights, config), config, num_classes


def to_public(system: str, weights: State, config: Any, image_size: int) -> dict[str, Tensor]:
    """Native weights as a published state dict, complete with its tables: the inverse of `native`.

    Raises InputError for a system whose published form is only read.
    """
    form = public(system)
    if form.to_public is None:
        raise InputError(f"system: the public layout of {system!r} is only read, not written")
    return {**form.fixed(config, image_size), **form.to_public(weights, config)}


def image_size(system: str, published: State) -> int | None:
    """The image size that published weights were made for, or None where they serve any."""
    form = public(system)
    return form.image_size_of(published, form.config_of(published))


def with_parts(system: str, config: Any, files: Mapping[str, str]) -> tuple[Any, int | None]:
    """(settings that read other files that the model needs, the size of its images or None where they do not tell).

    files: by the option of the import command. Raises InputError for one that is missing, or that the system lacks.
    """
    parts, size = public(system).parts, None
    if extra := [name for name in files if name not in parts]:
        raise InputError(f"--{extra[0]} {files[extra[0]]}: {system} reads no such file; leave it out")
    for name, read in parts.items():
        if name not in files:
            raise InputError(f"--{name}: {system} needs this file beside its weights; name it")
        config, size = read(config, Path(files[name]))
    return config, size


def settings(system: str, config: Any, image_size: int) -> dict[str, dict[str, Any]]:
    """What a run's configuration must say besides the model, for published weights to draw as they were published."""
    return public(system).sections(config, image_size)
