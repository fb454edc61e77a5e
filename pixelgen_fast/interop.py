"""Published checkpoints in: their names, packing and files, and models that keep them.

A published file is converted by renaming keys and packing tensors (w1 | w3, the two halves of a pixel block's
modulation); the maths is unchanged. Weights published by NVIDIA for PixelDiT stay under their own licence (NSCLv1,
research and evaluation only) after conversion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from pixelgen_fast.models import pixeldit

State = Mapping[str, Tensor]


class PublicLayout(nn.Module):
    """A model whose parameters keep the names and shapes of a published checkpoint.

    forward(x, t, y) follows the public convention (t = 0 is noise) and its gradients arrive under the public names;
    the computation is the native model's, on tensors packed on the fly. `native_state()` gives the packed weights.
    """

    def __init__(self, native: nn.Module, state: State, to_native: Callable[[State], dict[str, Tensor]]) -> None:
        super().__init__()
        self._native = [native]  # in a list, so that its own parameters are not registered a second time
        self._to_native = to_native
        self._names = list(state)
        for name, value in state.items():
            self._register(name, nn.Parameter(value.detach().clone()))

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, parameter)

    def native_state(self) -> dict[str, Tensor]:
        parameters = dict(self.named_parameters())
        return self._to_native({name: parameters[name] for name in self._names})

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return functional_call(self._native[0], self.native_state(), (x, t, y))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._native[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


def from_reference(system: str, config: Mapping[str, Any], state_dict: State) -> nn.Module:
    """A model from weights in the published layout, called as module(x [B, 3, S, S], t [B], y int64 [B]).

    system: "pixeldit". config: the constructor arguments of the public code plus image_size, as listed in
    `pixeldit_config`. state_dict: keys without a Lightning prefix.
    Raises ValueError for an unknown system or config key, and for missing, extra or misshapen weights, by name.
    """
    if system != "pixeldit":
        raise ValueError(f"system: no public layout for {system!r}; valid: pixeldit")
    settings, image_size, num_classes = pixeldit_config(config)
    wanted = pixeldit_public_shapes(settings, num_classes)
    check_state(state_dict, wanted)
    native = pixeldit.build(settings, image_size, num_classes)
    return PublicLayout(
        native, {name: state_dict[name] for name in wanted}, lambda state: pixeldit_to_native(state, settings)
    )


def pixeldit_config(config: Mapping[str, Any]) -> tuple[pixeldit.Config, int, int]:
    """Translate the public constructor's arguments. Returns (model config, image size, number of classes).

    Keys: image_size (256), in_channels (3), num_groups, hidden_size, pixel_hidden_size (16), patch_depth, pixel_depth,
    patch_size (16), num_classes (1000), use_pixel_abs_pos (true), pit_adaln_post_modulation (false).
    """
    config = {key: value for key, value in config.items() if key != "system"}
    fixed = {"in_channels": 3, "use_pixel_abs_pos": True}
    for key, value in fixed.items():
        if config.pop(key, value) != value:
            raise ValueError(f"config: {key} must be {value}, the published models know no other")
    image_size, num_classes = config.pop("image_size", 256), config.pop("num_classes", 1000)
    required = ("num_groups", "hidden_size", "patch_depth", "pixel_depth")
    if missing := [key for key in required if key not in config]:
        raise ValueError(f"config: missing {', '.join(missing)}")
    names = {"num_groups": "num_heads", "pit_adaln_post_modulation": "post_modulation"}
    known = {*required, "pixel_hidden_size", "patch_size", "pit_adaln_post_modulation"}
    if extra := [key for key in config if key not in known]:
        raise ValueError(f"config: unknown {', '.join(extra)}; valid: {', '.join(sorted(known | set(fixed)))}")
    settings = pixeldit.Config(**{names.get(key, key): value for key, value in config.items()})
    return settings, image_size, num_classes


def pixeldit_public_shapes(c: pixeldit.Config, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published PixelDiT, in the order of its state dict."""
    D, C, P, d = c.hidden_size, c.pixel_hidden_size, c.patch_size**2, c.hidden_size // c.num_heads
    F = int(2 * 4 * D / 3)
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def attention(name: str) -> None:
        linear(f"{name}.qkv", 3 * D, D, bias=False)
        shapes[f"{name}.q_norm.weight"] = shapes[f"{name}.k_norm.weight"] = (d,)
        linear(f"{name}.proj", D, D)

    linear("pixel_embedder.proj", C, 3)
    linear("s_embedder.proj", D, 3 * P)
    linear("t_embedder.mlp.0", D, 256)
    linear("t_embedder.mlp.2", D, D)
    shapes["y_embedder.embedding_table.weight"] = (num_classes + 1, D)
    shapes["final_layer.norm.weight"] = (C,)
    linear("final_layer.linear", 3, C)
    for i in range(c.patch_depth):
        block = f"patch_blocks.{i}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (D,)
        attention(f"{block}.attn")
        linear(f"{block}.mlp.w1", F, D, bias=False)
        linear(f"{block}.mlp.w3", F, D, bias=False)
        linear(f"{block}.mlp.w2", D, F, bias=False)
        linear(f"{block}.adaLN_modulation.0", 6 * D, D)
    for i in range(c.pixel_depth):
        block = f"pixel_blocks.{i}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (C,)
        linear(f"{block}.compress_to_attn", D, P * C)
        linear(f"{block}.expand_from_attn", P * C, D)
        attention(f"{block}.attn")
        linear(f"{block}.mlp.fc1", c.pixel_mlp_ratio * C, C)
        linear(f"{block}.mlp.fc2", C, c.pixel_mlp_ratio * C)
        linear(f"{block}.adaLN_modulation.0", (4 if c.post_modulation else 6) * C * P, D)
    return shapes


_PIXELDIT_NAMES = [
    (r"pixel_embedder\.proj", "pixel_embed"),
    (r"s_embedder\.proj", "patch_embed"),
    (r"t_embedder", "t_embed"),
    (r"y_embedder\.embedding_table", "y_embed"),
    (r"final_layer\.norm", "head.norm"),
    (r"final_layer\.linear", "head.linear"),
    (r"compress_to_attn", "compress"),
    (r"expand_from_attn", "expand"),
    (r"(pixel_blocks\.\d+)\.mlp\.fc", r"\1.fc"),
    (r"(patch_blocks\.\d+)\.adaLN_modulation\.0", r"\1.modulation"),
]


def pixeldit_to_native(state: State, config: pixeldit.Config) -> dict[str, Tensor]:
    """Rename and pack the weights of a published PixelDiT; differentiable."""
    state, native = dict(state), {}
    for name in [name for name in state if name.endswith("mlp.w1.weight")]:
        gate, value = state.pop(name), state.pop(name.replace("w1", "w3"))
        native[name.replace("w1", "w13")] = torch.cat([gate, value])
    for name in [name for name in state if re.match(r"pixel_blocks\.\d+\.adaLN_modulation", name)]:
        block, kind = name.split(".adaLN_modulation.0.")
        slots = rearrange(
            state.pop(name), "(P K C) ... -> P K C ...", P=config.patch_size**2, C=config.pixel_hidden_size
        )
        if not config.post_modulation:
            native[f"{block}.modulation_attn.{kind}"] = slots[:, :2].flatten(0, 2)
            slots = slots[:, 2:]
        native[f"{block}.modulation_mlp.{kind}"] = slots.flatten(0, 2)
    for name, value in state.items():
        for pattern, replacement in _PIXELDIT_NAMES:
            name = re.sub(pattern, replacement, name)
        native[name] = value
    return native


def check_state(state: State, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError naming every missing, extra and misshapen weight."""
    problems = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in state]
    problems += [f"extra {name} {list(value.shape)}" for name, value in state.items() if name not in wanted]
    problems += [
        f"{name} is {list(state[name].shape)}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + ("" if len(problems) <= 20 else f"\n  and {len(problems) - 20} more")
        raise ValueError(f"{len(problems)} weights do not fit the model:\n  {shown}")


def read_published(path: Path, system: str, weights: str = "ema") -> dict[str, Tensor]:
    """The state dict of a published file, without prefix.

    A PixelDiT file is a Lightning checkpoint whose "state_dict" has the prefixes denoiser., ema_denoiser. (either may
    be absent) and diffusion_trainer. (the REPA projector, left out). weights: "ema" or "raw"; what the file
    has is used when it holds only one of them.
    Raises FileNotFoundError, or ValueError when the file is not such a checkpoint.
    """
    if system != "pixeldit":
        raise ValueError(f"system: no public layout for {system!r}; valid: pixeldit")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # mmap keeps a file of several gigabytes out of memory; weights_only refuses to run code from the file
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable PyTorch checkpoint of plain tensors: {error}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: a Lightning checkpoint has a dictionary 'state_dict', this file has none")
    prefixes = {"ema": "ema_denoiser.", "raw": "denoiser."}
    found = {kind: {k[len(p) :]: v for k, v in state.items() if k.startswith(p)} for kind, p in prefixes.items()}
    chosen = found[weights] or found["raw" if weights == "ema" else "ema"]
    if not chosen:
        some = ", ".join(list(state)[:5])
        raise ValueError(f"{path}: no key begins with denoiser. or ema_denoiser.; the first keys are {some}")
    known = (*prefixes.values(), "diffusion_trainer.")
    if extra := [name for name in state if not name.startswith(known)]:
        raise ValueError(f"{path}: unknown keys {', '.join(extra[:10])}; expected prefixes {', '.join(known)}")
    # torch.compile of the whole module leaves this in the names
    return {name.removeprefix("_orig_mod."): value for name, value in chosen.items()}


def pixeldit_config_of(state: State) -> pixeldit.Config:
    """The size of a published PixelDiT, from the shapes of its weights. Raises ValueError when keys are missing."""
    needed = ("s_embedder.proj.weight", "pixel_embedder.proj.weight", "patch_blocks.0.attn.q_norm.weight",
              "pixel_blocks.0.adaLN_modulation.0.weight", "pixel_blocks.0.mlp.fc1.weight")  # fmt: skip
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"not a PixelDiT state dict: missing {', '.join(missing)}")
    D, features = state["s_embedder.proj.weight"].shape
    C = state["pixel_embedder.proj.weight"].shape[0]
    P = features // 3
    slots = state["pixel_blocks.0.adaLN_modulation.0.weight"].shape[0] // (P * C)

    def depth(name: str) -> int:
        return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(name))

    return pixeldit.Config(
        hidden_size=D,
        num_heads=D // state["patch_blocks.0.attn.q_norm.weight"].shape[0],
        patch_depth=depth("patch_blocks."),
        patch_size=round(P**0.5),
        pixel_hidden_size=C,
        pixel_depth=depth("pixel_blocks."),
        pixel_mlp_ratio=state["pixel_blocks.0.mlp.fc1.weight"].shape[0] // C,
        post_modulation=slots == 4,
    )


def native(system: str, published: State) -> tuple[dict[str, Tensor], pixeldit.Config, int]:
    """Convert a published state dict: (native weights, model config, number of classes).

    Raises ValueError naming every missing, extra or misshapen weight.
    """
    if system != "pixeldit":
        raise ValueError(f"system: no public layout for {system!r}; valid: pixeldit")
    config = pixeldit_config_of(published)
    table = published.get("y_embedder.embedding_table.weight")
    num_classes = 1000 if table is None else table.shape[0] - 1
    check_state(published, pixeldit_public_shapes(config, num_classes))
    return pixeldit_to_native(published, config), config, num_classes
