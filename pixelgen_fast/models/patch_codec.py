"""A patch as a few numbers and back: the bottleneck through which 768 numbers become easy to tell one by one.

    h = RMSNorm(W2 SiLU(W1 X))          on the sphere of radius sqrt(d)
    X' = W4 SiLU(W3 h)

PRA (arXiv 2606.27978) tells a 16-d state of a patch, decodes it to pixels, feeds those back, and trains on decodings of
noised states; its layers, noise and loss weights are not known to us, and what stands here is ours. The fixed length of
h keeps noise of a fixed size from being outgrown, and is what SphereAR (arXiv 2509.24335) has for its latents.
Shapes: X [..., F], h [..., d].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pixelgen_fast.layers import xavier_


class PatchCodec(nn.Module):
    """encode(X [..., F]) -> h [..., d], decode(h [..., d]) -> X [..., F]; hidden: width of the layers between."""

    def __init__(self, patch: int, width: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(patch, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.decoder = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, patch))
        xavier_(self)

    def encode(self, x: Tensor) -> Tensor:
        return on_sphere(self.encoder(x))

    def decode(self, h: Tensor) -> Tensor:
        return self.decoder(h)


def on_sphere(h: Tensor) -> Tensor:
    """The point of the sphere of radius sqrt(d) in the direction of h [..., d]."""
    return F.rms_norm(h, h.shape[-1:], eps=1e-6)
