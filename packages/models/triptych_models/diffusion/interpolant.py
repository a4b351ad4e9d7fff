"""Paths from noise to data: x_t = alpha(t) x_1 + sigma(t) x_0, x_1 data, x_0 noise, t from 0 to 1.

Stochastic interpolants of SiT (arXiv 2401.08740). Along a path x_t moves with the velocity
alpha'(t) x_1 + sigma'(t) x_0; what a model predicts of these is turned into the others here.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Interpolation, Prediction

BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP path: Song et al., arXiv 2011.13456


class Point(NamedTuple):
    """alpha, sigma and their derivatives at times, each broadcastable over the latents."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def det(self) -> Tensor:
        """alpha sigma' - sigma alpha', below zero: with it x and velocity give data and noise."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha


def point(path: Interpolation, times: Tensor, ndim: int) -> Point:
    """The path at times (N,), to be used with latents of so many dimensions."""
    t = times.view(-1, *[1] * (ndim - 1))
    if path == "linear":
        return Point(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))
    if path == "gvp":
        half = math.pi / 2
        sine, cosine = torch.sin(half * t), torch.cos(half * t)
        return Point(sine, cosine, half * cosine, -half * sine)
    rest = 1 - t
    log_alpha = -0.25 * rest**2 * (BETA_MAX - BETA_MIN) - 0.5 * rest * BETA_MIN
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    d_alpha = alpha * 0.5 * (rest * (BETA_MAX - BETA_MIN) + BETA_MIN)
    return Point(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


def time_bounds(path: Interpolation, prediction: Prediction) -> tuple[float, float]:
    """Within which times training draws and samplers stay, by the official code's rule.

    Where sigma is 0 a VP path has no derivative, and noise says nothing of data; where alpha is 0
    noise says nothing of the velocity.
    """
    if path == "vp":
        return 0.0, 1 - 1e-5
    return (0.0, 1.0) if prediction == "velocity" else (1e-3, 1 - 1e-3)


def to_velocity(prediction: Prediction, out: Tensor, x: Tensor, at: Point) -> Tensor:
    """The velocity that a prediction stands for at x."""
    if prediction == "velocity":
        return out
    noise = out if prediction == "noise" else -at.sigma * out
    data = (x - at.sigma * noise) / at.alpha
    return at.d_alpha * data + at.d_sigma * noise


def data_of(velocity: Tensor, x: Tensor, at: Point) -> Tensor:
    """The data that x is expected to become."""
    return (at.d_sigma * x - at.sigma * velocity) / at.det


def noise_of(velocity: Tensor, x: Tensor, at: Point) -> Tensor:
    """The noise that x is expected to hold; the score is that over -sigma."""
    return (at.alpha * velocity - at.d_alpha * x) / at.det


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times whose noise level u = 1 - t is s u / (1 + (s - 1) u)."""
    if shift == 1.0:
        return times
    level = 1 - times
    return 1 - shift * level / (1 + (shift - 1) * level)
