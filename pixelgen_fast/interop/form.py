"""What a published form of a system is: names, packing and files of its weights; with defaults for what most lack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pixelgen_fast.errors import InputError
from pixelgen_fast.interop.layout import Shapes, State
from pixelgen_fast.models.system import Settings


def lightning(content: Any, kinds: Mapping[str, str]) -> dict[str, State]:
    """The state dict that holds each kind of weights, of a Lightning checkpoint: the same for all."""
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError("a Lightning checkpoint has a dictionary 'state_dict', this file has none")
    return dict.fromkeys(kinds, state)


@dataclass(frozen=True)
class PublicForm:
    """A system's public form. A module of interop has one, named FORM.

    prefixes: kind of weights ("ema", "raw", ...) -> what stands before its names in the file; the first is the default.
    config(mapping): (Settings, image_size, num_classes) of the public constructor's arguments.
    public_shapes(settings, image_size, num_classes): {name: shape}, in the order of the public state dict.
    to_native(state, settings): native weights, by differentiable renaming and packing.
    config_of(state): Settings, from names and shapes alone.

    ignored: prefixes of names in the file that are left out. read(content, prefixes): {kind: its state dict, prefixes
    and all}, of a file as the public code writes it.
    image_size_of(state, settings): the image size, where weights tell.
    fixed(settings, image_size): {public name: table}, for what the file holds and the model computes.
    frozen: names in the file that are not trained, and that the model cannot compute.
    class_table: public name of the weight with a row for each class, the last for no class. bare: the kind of a file of
    weights alone, under names without prefix. no_class(state): how many rows of the table are no class.
    call(net, x, t, y): what the public network answers, by the native one net(z, t, y); t = 0 may be data there.
    to_public(weights, settings): public weights of native ones, without the fixed tables; None where there is no way.
    parts: {option of the import command: (settings, its file) -> (settings that read it, image size)}, for what the
    model needs beside these weights.
    sections(settings, image_size): {section of a run's configuration: its settings}, with which the weights draw.
    """

    prefixes: Mapping[str, str]
    config: Callable[[Mapping[str, Any]], tuple[Any, int, int]]
    public_shapes: Callable[[Any, int, int], Shapes]
    to_native: Callable[[State, Any], dict[str, Tensor]]
    config_of: Callable[[State], Settings]
    ignored: tuple[str, ...] = ()
    read: Callable[[Any, Mapping[str, str]], dict[str, State]] = lightning
    image_size_of: Callable[[State, Any], int | None] = lambda state, settings: None
    fixed: Callable[[Any, int], dict[str, Tensor]] = lambda settings, image_size: {}
    frozen: tuple[str, ...] = ()
    class_table: str = "y_embedder.embedding_table.weight"
    bare: str = "raw"
    no_class: Callable[[State], int] = lambda state: 1
    call: Callable[..., Any] = lambda net, *inputs: net(*inputs)
    to_public: Callable[[State, Any], dict[str, Tensor]] | None = None
    parts: Mapping[str, Callable[[Any, Path], tuple[Any, int]]] = field(default_factory=dict)
    sections: Callable[[Any, int], dict[str, dict[str, Any]]] = lambda settings, image_size: {}
