"""A DINO that reads noised images: the teacher's network with the time as one more prefix token.

    x      = resize(((z + 1) / 2 - mean) / std)                                     as the teacher sees clean images
    tokens = [class, registers, MLP(sinusoid(t)), patches of x]                     the MLP's last layer starts at 0
    output = norm(blocks(tokens)), patch tokens only

Method A: DINO_student(z, t) follows DINO_teacher(x), and starts as the teacher. DINOv3 (arXiv 2508.10104) is timm's
Eva, DINOv2 (arXiv 2304.07193) its VisionTransformer. LoRA (arXiv 2106.09685): W -> W + (alpha / r) B A, here alpha = r.
Shapes: B images of S x S pixels, L patches, D' the network's width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgen_fast.dino.network import block_outputs, embed_patches, rotary_table
from pixelgen_fast.layers import Float32Tables, TimestepEmbedder

Tuning = Literal["full", "lora", "frozen"]
TimeToken = Literal["token", "masked"]

MAX_PERIOD = 10.0
# The four products of a block. A bare "proj" would take the patch embedding too.
LORA_TARGETS = r".*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\w+)"


class NoisyDino(Float32Tables):
    """forward(z [B, 3, S, S], t [B] in [0, 1]) -> patch tokens [B, L, D'] after the last norm.

    network: as `teacher.load_dino` gives; it is set to its input size, and changed, in place. grid: patches a side.
    tuning: full trains all of it; lora trains adapters of rank lora_rank beside the products of its blocks; frozen
    trains none of it. The time token's MLP is trained in any case. time_token: masked hides the token from every
    other. What no token sees changes nothing, so it is then left out, and the output is the teacher's own, for all t.
    With token it is that at no t exactly: a token of zeros still takes a share of the attention.

    width: D'. side: pixels of the network's input.
    Weights are named network.<timm's name> and time.mlp.{0,2}. LoRA renames <layer>.weight to <layer>.base_layer.weight
    and adds <layer>.lora_A.default.weight, <layer>.lora_B.default.weight, as peft does.
    Raises ValueError for other settings than these; ImportError without peft for lora.
    """

    def __init__(
        self,
        network: nn.Module,
        grid: int,
        *,
        tuning: Tuning = "full",
        lora_rank: int = 16,
        time_token: TimeToken = "token",
    ) -> None:
        super().__init__()
        for key, value, valid in (
            ("tuning", tuning, get_args(Tuning)),
            ("time_token", time_token, get_args(TimeToken)),
        ):
            if value not in valid:
                raise ValueError(f"{key} {value!r}: valid are {', '.join(valid)}")
        self.grid, self.width = grid, network.num_features
        self.side = grid * network.patch_embed.patch_size[0]
        network.set_input_size(img_size=(self.side, self.side))
        network.requires_grad_(tuning == "full")
        if tuning == "lora":
            add_lora(network, lora_rank)
        self.network = network
        self.time: TimestepEmbedder | None = None
        if time_token == "token":
            self.time = TimestepEmbedder(self.width, MAX_PERIOD)
            nn.init.zeros_(self.time.mlp[2].weight)
            nn.init.zeros_(self.time.mlp[2].bias)
            make_room(network)
        self.prefix = network.num_prefix_tokens

        for name in ("mean", "std"):
            value = torch.tensor(network.pretrained_cfg[name])[:, None, None]
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("rope", rotary_table(network, grid), persistent=False)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        tokens = embed_patches(self.network, self.preprocess(z))
        if self.time is not None:
            prefix, patches = tokens[:, : self.prefix - 1], tokens[:, self.prefix - 1 :]
            tokens = torch.cat([prefix, self.time(t)[:, None], patches], dim=1)
        for output in block_outputs(self.network, tokens, self.rope):
            tokens = output
        return self.network.norm(tokens)[:, self.prefix :]

    def preprocess(self, z: Tensor) -> Tensor:
        """[B, 3, S, S] -> what the network takes, [B, 3, side, side]. Noise leaves [-1, 1], and nothing is clipped."""
        x = ((z.to(torch.promote_types(z.dtype, torch.float32)) + 1) / 2 - self.mean) / self.std
        if x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bicubic")
        return x.to(self.network.patch_embed.proj.weight.dtype)


def make_room(network: nn.Module) -> None:
    """Count one more prefix token. Each attention keeps a count of its own, of the tokens that it does not rotate."""
    network.num_prefix_tokens += 1
    for block in network.blocks:
        if hasattr(block.attn, "num_prefix_tokens"):
            block.attn.num_prefix_tokens += 1


def add_lora(network: nn.Module, rank: int) -> None:
    """Adapters beside the products of every block, in place; they alone are trained."""
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}; it must be at least 1")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("tuning by LoRA needs peft: pip install pixelgen_fast[teacher]") from error
    for block in network.blocks:
        # With biases of the queries and values, timm reads the weight of qkv without calling the layer, past any
        # adapter, unless the biases are added on their own.
        if getattr(block.attn, "q_bias", None) is not None:
            block.attn.qkv_bias_separate = True
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), network)
