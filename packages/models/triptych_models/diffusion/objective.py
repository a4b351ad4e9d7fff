"""What a diffusion model learns: the squared error of its prediction along a path."""

import torch
from torch import Tensor

from .config import ObjectiveConfig
from .interpolant import Point, point, shifted, time_bounds


def draw_times(uniform: Tensor, config: ObjectiveConfig) -> Tensor:
    """Times from numbers in [0, 1), (N,)."""
    if config.times == "logit_normal":
        inside = uniform.clamp(1e-6, 1 - 1e-6)
        uniform = torch.special.ndtri(inside).sigmoid()
    low, high = time_bounds(config.path, config.prediction)
    return low + (high - low) * shifted(uniform, config.shift)


def mix(latents: Tensor, noise: Tensor, at: Point) -> Tensor:
    """x_t, on the way from noise to latents."""
    return at.alpha * latents + at.sigma * noise


def squared_error(
    out: Tensor, latents: Tensor, noise: Tensor, at: Point, config: ObjectiveConfig
) -> Tensor:
    """Of a prediction, element by element, weighed; as SiT's equations 7 and 9."""
    if config.prediction == "velocity":
        return (out - (at.d_alpha * latents + at.d_sigma * noise)).square()
    # A score times -sigma is noise: compared as such, it does not blow up where sigma is small.
    guess = out if config.prediction == "noise" else -at.sigma * out
    return (guess - noise).square() * _weight(at, config)


def _weight(at: Point, config: ObjectiveConfig) -> Tensor:
    if config.weighting == "none":
        return torch.ones_like(at.alpha)
    if config.weighting == "velocity":  # an error of the noise is det / alpha of the velocity's
        return (at.det / at.alpha).square()
    return -at.det / (at.alpha * at.sigma)


def path_point(times: Tensor, latents: Tensor, config: ObjectiveConfig) -> Point:
    """The objective's path at times (N,)."""
    return point(config.path, times, latents.ndim)
