"""MAR's encoder-decoder over the pieces of an image, some of which are hidden (arXiv 2406.11838).

    x = LN([class tokens, W pieces] + position)          K class tokens, all the embedding of the class
    h = encoder blocks (those of x that are not hidden)                      hidden pieces cost the encoder nothing
    s = decoder blocks ([W' LN(h), mask token where hidden] + position)
    z = LN(s) of the pieces + target position

Every z knows the pieces that are not hidden, and says nothing of what order they came in. An image may hide another
number of pieces than its neighbours in a batch: the encoder then has as many places as the most that may be known, and
no one reads those that stay empty.
Shapes: B images, L pieces of F numbers, K class tokens, D width, n places for known pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixelgen_fast.layers import ViTBlock, small_, xavier_

EPS = 1e-6


class MaskedTrunk(nn.Module):
    """forward(pieces [B, L, F], hidden bool [B, L], y int64 [B], known) -> z [B, L, D].

    width: F. y = num_classes is no class. known: at least as many as an image has pieces that are not hidden; what the
    pieces are where they are hidden does not matter. dropout: in training, of the blocks.
    """

    def __init__(
        self,
        width: int,
        length: int,
        num_classes: int,
        class_tokens: int,
        encoder: tuple[int, int, int],
        decoder: tuple[int, int, int],
        dropout: float = 0.0,
    ) -> None:
        """encoder, decoder: (width, blocks, heads)."""
        super().__init__()
        self.class_tokens = class_tokens
        (D, depth, heads), (decoder_D, decoder_depth, decoder_heads) = encoder, decoder
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.enter, self.enter_norm = nn.Linear(width, D), nn.LayerNorm(D, eps=EPS)
        self.encoder_position = nn.Parameter(torch.empty(class_tokens + length, D))
        self.encoder_blocks = nn.ModuleList(ViTBlock(D, heads, 4 * D, EPS, dropout) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(D, eps=EPS)
        self.cross = nn.Linear(D, decoder_D)
        self.mask_token = nn.Parameter(torch.empty(decoder_D))
        self.decoder_position = nn.Parameter(torch.empty(class_tokens + length, decoder_D))
        self.decoder_blocks = nn.ModuleList(
            ViTBlock(decoder_D, decoder_heads, 4 * decoder_D, EPS, dropout) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_D, eps=EPS)
        self.target_position = nn.Parameter(torch.empty(length, decoder_D))
        self.initialise()

    def initialise(self) -> None:
        xavier_(self)
        small_(self.y_embed.weight, self.mask_token)
        small_(self.encoder_position, self.decoder_position, self.target_position)

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder_blocks, *self.decoder_blocks]

    def forward(self, pieces_BLF: Tensor, hidden_BL: Tensor, y_B: Tensor, known: int) -> Tensor:
        K = self.class_tokens
        classes = self.y_embed(y_B)[:, None].expand(-1, K, -1)
        x = self.enter_norm(torch.cat([classes, self.enter(pieces_BLF)], dim=1) + self.encoder_position)
        # known pieces come first, as they lie in the image, and hidden ones fill the places that are left
        order_Bn = hidden_BL.to(torch.uint8).argsort(dim=1, stable=True)[:, :known]
        seen = torch.cat([torch.ones_like(hidden_BL[:, :1]).expand(-1, K), ~hidden_BL.gather(1, order_Bn)], dim=1)
        x = torch.cat([x[:, :K], gather(x[:, K:], order_Bn)], dim=1)
        for block in self.encoder_blocks:
            x = block(x, seen)
        x = self.cross(self.encoder_norm(x))
        x = torch.cat([x[:, :K], self.spread(x[:, K:], order_Bn, hidden_BL)], dim=1) + self.decoder_position
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, K:] + self.target_position

    def spread(self, x_BnD: Tensor, order_Bn: Tensor, hidden_BL: Tensor) -> Tensor:
        """Known pieces at their places in the image, the mask token at all others: [B, L, D]."""
        index = order_Bn[..., None].expand_as(x_BnD)
        placed = x_BnD.new_zeros(*hidden_BL.shape, x_BnD.shape[-1]).scatter(1, index, x_BnD)
        return torch.where(hidden_BL[..., None], self.mask_token, placed)


def gather(x_BLD: Tensor, places_Bn: Tensor) -> Tensor:
    """Those of the pieces of each image that are at these places: [B, n, D]."""
    return x_BLD.gather(1, places_Bn[..., None].expand(-1, -1, x_BLD.shape[-1]))
