"""The energy-guided path: data at its end come out of a blur as time goes on (EG-FM, arXiv 2608.05811).

    G_s(f) = exp(-A s r^2),   A = (pi sigma0)^2,   r^2 = (f_y^2 + f_x^2) / 0.5      s in [0, 1]: 1 most blurred, 0 clean
    I(s)   = sum_f E (G_s - G_1)^2,   E = sum_c |X|^2                               X the Fourier transform of x
    s(t)   solves I(s) = rho(u) I(0)                             the share of the energy that the blur has let go
    rho(u) = u^3 (6 u^2 - 15 u + 10),   u = (t - start) / (end - start), held in [0, 1]
    x*     = F^-1[G_s X]                x*' = dx*/dt = F^-1[-A r^2 s' G_s X],   s' = (du/dt) rho'(u) I(0) / I'(s)
    z      = t x* + (1-t) c e           v = dz/dt = x* + t x*' - c e             c the noise scale

f_y and f_x are cycles per pixel, so r = 1 is the highest frequency there is, G_s a Gaussian blur of sigma0 sqrt(s)
pixels at any resolution. r = 0 at f = 0: the mean never changes. At t = end the data are whole: x* = x, x*' = 0.

Shapes: B images of C x H x W; h = H // 2 + 1 and w = W // 2 + 1 frequencies from 0 up; t, s [B]. float32 or wider.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pixelgen_fast.diffusion.path import add_noise, convert, per_image, truth, widen
from pixelgen_fast.settings import PathKind

NEAR = 1e-6  # a released share this near to 0 or 1 counts as that
NO_ENERGY = 1e-12


class Endpoint(NamedTuple):
    """Where the path of each image ends, seen from time t: x* and dx*/dt, each [B, C, H, W]; t [B]."""

    x: Tensor
    rate: Tensor
    t: Tensor

    def noised(self, e: Tensor, noise_scale: float = 1.0) -> Tensor:
        """z, the noised images. e: [B, C, H, W]."""
        return add_noise(self.x, e, self.t, noise_scale)

    def velocity(self, e: Tensor, noise_scale: float = 1.0) -> Tensor:
        """v at the noised images, from their noise. e: [B, C, H, W]."""
        return truth("v", self.x, e, noise_scale) + self._drift()

    def velocity_at(self, z: Tensor, t_eps: float = 0.05) -> Tensor:
        """v at the noised images z from themselves, (x* - z) / max(1-t, t_eps) + t x*': how a prediction of x is read.

        Equals `velocity` where 1-t is at least t_eps.
        """
        return convert(self.x, z, self.t, "x", "v", t_eps=t_eps) + self._drift()

    def _drift(self) -> Tensor:
        return per_image(self.t, self.x) * self.rate


class EnergyPath(NamedTuple):
    """The path of a run.

    sigma0: of the strongest blur, in pixels. release: times at which it begins and ends to let go. bisections: steps of
    the search for s, which is found to 2^-(bisections + 1).
    """

    sigma0: float = 3.5
    release: tuple[float, float] = (0.0, 1.0)
    bisections: int = 16

    def endpoint(self, x: Tensor, t: Tensor) -> Endpoint:
        """Where the path of x ends, seen from t.

        x: [B, C, H, W], data or a prediction of them, any float dtype. t: [B] in [0, 1]. Differentiable in x, with s
        and s' held: they are read off x, and a gradient through them is not finite for an image without contrast.
        """
        x = widen(x)
        t = t.to(x.dtype)
        shape, spectrum = x.shape[-2:], torch.fft.rfft2(x)
        with torch.no_grad():
            all_rows = torch.fft.fftfreq(shape[0], device=x.device, dtype=x.dtype)
            rows, columns = (torch.fft.rfftfreq(n, device=x.device, dtype=x.dtype) for n in shape)
            energy = folded_energy(spectrum.detach(), shape[1])
            s, rate = self._heat_time(energy, Blur.of(self.sigma0, rows, columns), t)
            blur = Blur.of(self.sigma0, all_rows, columns)
            gain = blur.gain(s)
            slope = gain * blur.logarithm() * rate[:, None, None]
        x_star, x_rate = (torch.fft.irfft2(factor[:, None] * spectrum, s=shape) for factor in (gain, slope))
        return Endpoint(x_star, x_rate, t)

    def _heat_time(self, energy: Tensor, blur: Blur, t: Tensor) -> tuple[Tensor, Tensor]:
        """(s, ds/dt) [B] for the energies [B, h, w] of a grid of frequencies."""
        start, end = self.release
        share, share_rate = released((t - start) / (end - start))
        last = blur.gain(torch.ones_like(t))
        root = energy.sqrt()
        last_root = -root * last

        def distance(s: Tensor) -> Tensor:
            """The root of I(s), in few kernels: the search is a chain of small ones."""
            return torch.linalg.vector_norm(torch.addcmul(last_root, root, blur.gain(s)), dim=(1, 2))

        most = distance(torch.zeros_like(t))
        wanted, s = share.sqrt() * most, torch.zeros_like(t)
        for halving in range(1, self.bisections + 1):
            middle = s + 2.0**-halving
            s = torch.where(distance(middle) > wanted, middle, s)
        s = torch.where(share >= 1 - NEAR, 0.0, torch.where(share <= NEAR, 1.0, s + 2.0 ** -(self.bisections + 1)))
        gain, total = blur.gain(s), most.square()
        slope = 2 * (energy * (gain - last) * gain * blur.logarithm()).sum(dim=(1, 2))
        held = (share_rate <= 0) | (total <= NO_ENERGY) | (slope.abs() <= NO_ENERGY)
        rate = share_rate / (end - start) * total / torch.where(held, 1.0, slope)
        return s, torch.where(held, 0.0, rate)


class Blur(NamedTuple):
    """G on a grid of frequencies, a product of two Gaussians: the logarithms at s = 1 of rows and columns, joined."""

    parts: Tensor
    rows: int

    @classmethod
    def of(cls, sigma0: float, rows: Tensor, columns: Tensor) -> Blur:
        """rows [h], columns [w]: frequencies, in cycles per pixel."""
        return cls(torch.cat([rows, columns]).square() * (-2 * (math.pi * sigma0) ** 2), len(rows))

    def gain(self, s: Tensor) -> Tensor:
        """G_s [B, h, w]."""
        factors = torch.exp(s[:, None] * self.parts)
        return factors[:, : self.rows, None] * factors[:, None, self.rows :]

    def logarithm(self) -> Tensor:
        """-A r^2 [h, w]."""
        return self.parts[: self.rows, None] + self.parts[self.rows :]


def energy_path(kind: PathKind, sigma0: float, release: tuple[float, float]) -> EnergyPath | None:
    """The path that `objective.path` names with its settings; None is the linear one."""
    return EnergyPath(sigma0, tuple(release)) if kind == "energy_guided" else None


def released(u: Tensor) -> tuple[Tensor, Tensor]:
    """rho and rho' = 30 u^2 (1-u)^2 of u, held in [0, 1]: the share of the energy that is let go, and its slope."""
    u = u.clamp(0, 1)
    return u**3 * (6 * u**2 - 15 * u + 10), 30 * (u * (1 - u)).square()


def folded_energy(spectrum: Tensor, width: int) -> Tensor:
    """E summed over the signs of both frequencies, of which G depends on neither: [B, h, w].

    spectrum: [B, C, H, w] of real images `width` pixels wide, as rfft2 gives it.
    """
    energy = torch.view_as_real(spectrum).square().sum(dim=(1, 4))
    height = energy.shape[1]
    # rfft2 leaves out the columns of negative frequencies, which mirror these
    energy[..., 1 : (width + 1) // 2] *= 2
    half = energy[:, : height // 2 + 1].clone()
    half[:, 1 : (height + 1) // 2] += energy[:, height // 2 + 1 :].flip(1)
    return half
