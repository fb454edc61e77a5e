"""The network that learns, as student and as teacher: a DINOv3 of timm, a mask token, and two heads.

    tokens = norm(blocks([class, registers, patches]))      masked patches enter as the mask token
    logits = (W / |W|) (h / |h|),   h = MLP(token)          one head for class tokens, one for patches

Shapes: B images, L patches, D width, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.distill.schema import Objective, TeacherConfig

ARCHITECTURE = "vit_small_patch16_dinov3"


def network_kwargs(config: TeacherConfig) -> dict[str, Any]:
    """What timm.create_model makes the network from, beside ARCHITECTURE."""
    n = config.network
    return {
        "embed_dim": n.embed_dim,
        "depth": n.depth,
        "num_heads": n.num_heads,
        "patch_size": n.patch_size,
        "img_size": config.data.image_size,
        "init_values": n.layer_scale,
    }


class Head(nn.Module):
    """Tokens [N, D] -> logits [N, K], cosines in [-1, 1]. Batch norm uses the batch's statistics, always."""

    def __init__(self, width: int, objective: Objective) -> None:
        super().__init__()
        hidden, out = objective.head_hidden, objective.head_width
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden, track_running_stats=False),
            nn.GELU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden, track_running_stats=False),
            nn.GELU(),
            nn.Linear(hidden, out),
        )
        self.prototypes = nn.Parameter(torch.randn(objective.prototypes, out))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(tokens), dim=-1), F.normalize(self.prototypes, dim=-1))


class Learner(nn.Module):
    """forward(images [B, 3, s, s], hidden bool [B, L]) -> class tokens [B, D] and patch tokens [B, L, D].

    s: any multiple of the patch size; rotary positions follow it. hidden: the masked patches, none if left out.
    """

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError("a teacher is made by timm: pip install pixelgen_fast[teacher]") from error
        self.network = timm.create_model(ARCHITECTURE, num_classes=0, **network_kwargs(config))
        # timm's 0.02 suits widths near 1000: in a narrow network every class token would begin nearly the same, and
        # then the easiest prediction, all prototypes alike, is where training stays.
        for module in self.network.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        self.mask_token = nn.Parameter(torch.zeros(config.network.embed_dim))
        self.class_head = Head(config.network.embed_dim, config.objective)
        self.patch_head = Head(config.network.embed_dim, config.objective)

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        net = self.network
        grid = net.patch_embed.proj(images)
        rope = net.rope.get_embed(shape=list(grid.shape[2:]))
        patches = rearrange(grid, "B D h w -> B (h w) D")
        if hidden is not None:
            patches = torch.where(hidden[..., None], self.mask_token, patches)
        prefix = torch.cat([net.cls_token, net.reg_token], dim=1).expand(len(images), -1, -1)
        x = torch.cat([prefix, patches], dim=1)
        for block in net.blocks:
            x = block(x, rope=rope)
        x = net.norm(x)
        return x[:, 0], x[:, net.num_prefix_tokens :]
