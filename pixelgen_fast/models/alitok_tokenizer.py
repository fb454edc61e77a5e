"""AliTok's tokenizer (arXiv 2506.05289): an image as N words of a codebook, and the image of such words.

    encoder: [patches + position, N learned tokens + position] -> LN -> blocks -> last N -> LN -> Linear       latent z
    words:   id = argmin_i |z - e_i|^2,   z_q = e_id
    decoder: [K learned tokens, W z_q] + position -> LN -> blocks -> last grid^2 -> LN -> Linear -> patches -> a 3 x 3
             matrix on the colours of each pixel -> sigmoid

Blocks are those of a plain vision transformer. N = prefix + grid^2: the model that draws words reads the prefix first,
then the grid row by row. Files have the published names; nothing here is trained by this package.

Shapes: B images of S x S pixels in [0, 1], N words, E the size of a word's vector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import ViTBlock, small_
from pixelgen_fast.weights import misfits, plain_names, read_file

RANDOM = "random"
FILE = "model.safetensors"
KEY = "model.tokenizer"
EPS = 1e-5
# the published names of what a block consists of
_PUBLIC = {
    "norm1": "ln_1",
    "qkv": "attn.in_proj",
    "proj": "attn.out_proj",
    "norm2": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}


@dataclass(frozen=True)
class TokenizerSize:
    """The defaults are the published tokenizer's. widths: of blocks; decoder_tokens: K."""

    grid: int = 16
    patch: int = 16
    prefix: int = 17
    words: int = 4096
    vector: int = 32
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 1024
    decoder_depth: int = 24
    decoder_heads: int = 16
    decoder_tokens: int = 32

    @property
    def length(self) -> int:
        """N: words of an image."""
        return self.prefix + self.grid**2


class Trunk(nn.Module):
    """What encoder and decoder share: a norm, blocks, the last tokens of them, a norm."""

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ViTBlock(width, num_heads, 4 * width, EPS) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)

    def through(self, x_BLD: Tensor, last: int) -> Tensor:
        """[B, L, D] -> [B, last, D]."""
        x_BLD = self.ln_pre(x_BLD)
        for block in self.transformer:
            x_BLD = block(x_BLD)
        return self.ln_post(x_BLD[:, -last:])


class Encoder(Trunk):
    """Images [B, 3, S, S] and learned tokens [N, D] to latents [B, N, E]."""

    def __init__(self, size: TokenizerSize) -> None:
        D = size.encoder_width
        super().__init__(D, size.encoder_depth, size.encoder_heads)
        self.patch_embed = nn.Conv2d(3, D, size.patch, size.patch)
        self.positional_embedding = nn.Parameter(torch.empty(size.grid**2, D))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(size.length, D))
        self.conv_out = nn.Conv2d(D, size.vector, 1)
        small_(self.positional_embedding, self.latent_token_positional_embedding)

    def forward(self, images: Tensor, tokens_ND: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).mT + self.positional_embedding
        own = (tokens_ND + self.latent_token_positional_embedding).expand(len(images), -1, -1)
        return pointwise(self.conv_out, self.through(torch.cat([patches, own], dim=1), own.shape[1]))


class Decoder(Trunk):
    """Vectors of words [B, N, E] to images [B, 3, S, S] in (0, 1)."""

    def __init__(self, size: TokenizerSize) -> None:
        D, K = size.decoder_width, size.decoder_tokens
        super().__init__(D, size.decoder_depth, size.decoder_heads)
        self.grid, self.patch = size.grid, size.patch
        self.decoder_embed = nn.Linear(size.vector, D)
        self.class_embedding = nn.Parameter(torch.empty(K, D))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(K + size.length, D))
        self.ffn = nn.Sequential(nn.Conv2d(D, 3 * size.patch**2, 1))
        self.conv_out = nn.Conv2d(3, 3, 1)
        small_(self.class_embedding, self.latent_token_positional_embedding)

    def forward(self, z_BNE: Tensor) -> Tensor:
        own = self.class_embedding.expand(len(z_BNE), -1, -1)
        x = torch.cat([own, self.decoder_embed(z_BNE)], dim=1) + self.latent_token_positional_embedding
        patches = pointwise(self.ffn[0], self.through(x, self.grid**2))
        image = rearrange(patches, "B (h w) (p q C) -> B C (h p) (w q)", h=self.grid, p=self.patch, q=self.patch)
        return torch.sigmoid(self.conv_out(image))


class Quantizer(nn.Module):
    """The codebook: words [V, E]."""

    def __init__(self, size: TokenizerSize) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.words, size.vector)

    def nearest(self, z_BNE: Tensor) -> Tensor:
        """The word nearest to each latent, int64 [B, N]."""
        words = self.embedding.weight
        # |z|^2 is the same for all words
        return (words.square().sum(-1) - 2 * z_BNE @ words.mT).argmin(-1)


class Tokenizer(nn.Module):
    """Images in [0, 1] to words and back."""

    def __init__(self, size: TokenizerSize) -> None:
        super().__init__()
        self.latent_tokens = nn.Parameter(torch.empty(size.length, size.encoder_width))
        self.encoder = Encoder(size)
        self.decoder = Decoder(size)
        self.quantize = Quantizer(size)
        small_(self.latent_tokens)

    def latents(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, E]."""
        return self.encoder(images, self.latent_tokens)

    def encode(self, images: Tensor) -> Tensor:
        """Words int64 [B, N] of images [B, 3, S, S]."""
        return self.quantize.nearest(self.latents(images))

    def decode(self, ids: Tensor) -> Tensor:
        """Images [B, 3, S, S] in (0, 1) of words int64 [B, N]."""
        return self.decoder(self.quantize.embedding(ids))


def pointwise(conv: nn.Conv2d, x_BLD: Tensor) -> Tensor:
    """A 1 x 1 convolution of tokens [B, L, D]."""
    return F.linear(x_BLD, conv.weight.flatten(1), conv.bias)


def load_tokenizer(size: TokenizerSize, source: str | None) -> Tokenizer:
    """A tokenizer with its weights, on the CPU in float32, frozen. On the meta device none are read.

    source: a file in the published names, a folder that `save_tokenizer` wrote, or "random" for a fixed initialisation.
    Raises InputError for None, and for a file that is not there, cannot be read or does not fit.
    """
    if source is None:
        raise InputError(
            f"{KEY} is null; name the published AliTok.pth or a folder that holds a tokenizer, or {RANDOM!r}"
        )
    _check(size)
    if torch.get_default_device().type == "meta":
        tokenizer = Tokenizer(size)
    elif source == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer = Tokenizer(size)
    else:
        with torch.device("meta"):
            tokenizer = Tokenizer(size)
        fill(tokenizer, read_weights(source), f"{KEY} {source}")
    return tokenizer.requires_grad_(False).eval()


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's weights into a folder, for `load_tokenizer` to read."""
    state = {name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    save_file({public_name(name): value for name, value in state.items()}, folder / FILE)


def public_name(name: str) -> str:
    """The name that a weight of a Tokenizer has in a file."""
    return re.sub(r"(transformer\.\d+\.)(\w+)", lambda found: found[1] + _PUBLIC[found[2]], name)


def fill(tokenizer: Tokenizer, state: Mapping[str, Tensor], origin: str) -> None:
    """Give a tokenizer weights by their published names, as float32. Raises InputError for what does not fit."""
    own = {public_name(name): (name, value) for name, value in tokenizer.state_dict().items()}
    if wrong := misfits(state, {name: value for name, (_, value) in own.items()}):
        raise InputError(f"{origin}: {len(wrong)} weights do not fit: {'; '.join(wrong[:10])}")
    # copies, because a file is read from where it lies
    copies = {own[name][0]: value.to(torch.float32, copy=True) for name, value in state.items()}
    tokenizer.load_state_dict(copies, assign=True)


def _check(size: TokenizerSize) -> None:
    for name in ("encoder", "decoder"):
        width, heads = getattr(size, f"{name}_width"), getattr(size, f"{name}_heads")
        if width % heads:
            raise InputError(f"model.{name}_heads {heads} does not divide model.{name}_width {width}")


def read_weights(source: str) -> dict[str, Tensor]:
    """The weights of a tokenizer by name, from its file, or from a folder that `save_tokenizer` wrote."""
    path = Path(source)
    if not path.exists():
        raise InputError(f"{KEY} {source}: no such file or folder; name the published AliTok.pth, or {RANDOM!r}")
    state = read_file(path / FILE if path.is_dir() else path)
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{KEY} {source}: holds {other[0]}, which is no weight; save the state dict alone")
    return plain_names(state, source)
