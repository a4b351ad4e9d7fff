"""From noise to data: explicit Runge-Kutta steps of the ODE, and steps of an SDE.

Both run t from 0 to 1 along a model's velocity. The SDE (SiT, section 2.4) adds w(t) times the
score to the velocity and noise of variance 2 w(t) dt: at every time its samples spread alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .config import SamplerConfig
from .interpolant import Point, data_of, noise_of, point, time_bounds
from .model import Condition, DiffusionModel

Velocity = Callable[[Tensor, float], Tensor]


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: of each stage its time and the shares of those before."""

    times: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    result: tuple[float, ...]


METHODS = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    # Dormand and Prince, 1980: its fifth order; with equal steps the embedded fourth is not needed.
    "dopri5": Tableau(
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
}


@torch.no_grad()
def sample(
    model: DiffusionModel,
    noise: Tensor,
    condition: Condition,
    config: SamplerConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Data (N, C, ...) from noise of its shape, fp32.

    generator: on the host, for the noise of an SDE.
    """
    path, prediction = model.objective.path, model.objective.prediction
    low, high = time_bounds(path, prediction)

    def velocity(x: Tensor, time: float) -> Tensor:
        return model.velocity(x, time, config.guidance, condition)

    if config.method in METHODS:
        return integrate(velocity, noise, (low, high), config.steps, METHODS[config.method])
    if config.diffusion == "sbdm":
        low = max(low, 1e-3)  # w is infinite where alpha is 0
    end = 1 - config.last_step

    def at(time: float) -> Point:
        return point(path, noise.new_full((1,), time), noise.ndim)

    def diffusion(time: float) -> Tensor:
        return diffusion_at(config.diffusion, at(time), time)

    def drift(x: Tensor, time: float) -> Tensor:
        moves, here = velocity(x, time), at(time)
        score = -noise_of(moves, x, here) / here.sigma
        return moves + diffusion(time) * score

    x = wander(drift, diffusion, noise, (low, end), config, generator)
    return data_of(velocity(x, end), x, at(end))


def integrate(
    velocity: Velocity, x: Tensor, span: tuple[float, float], steps: int, method: Tableau
) -> Tensor:
    """dx = velocity(x, t) dt from one end of the span to the other, in equal steps."""
    start, end = span
    dt = (end - start) / steps
    for step in range(steps):
        time, slopes = start + step * dt, list[Tensor]()
        for after, shares in zip(method.times, method.stages, strict=True):
            slopes.append(velocity(_moved(x, dt, shares, slopes), time + after * dt))
        x = _moved(x, dt, method.result, slopes)
    return x


def wander(
    drift: Velocity,
    diffusion: Callable[[float], Tensor],
    x: Tensor,
    span: tuple[float, float],
    config: SamplerConfig,
    generator: torch.Generator | None,
) -> Tensor:
    """dx = drift(x, t) dt + sqrt(2 w(t)) dW by Euler and Maruyama's steps, or Heun's."""
    start, end = span
    dt = (end - start) / config.steps
    for step in range(config.steps):
        time = start + step * dt
        kicked = x + (2 * dt * diffusion(time)).sqrt() * _normal(x, generator)
        slope = drift(kicked, time)
        moved = kicked + dt * slope
        if config.method == "sde_heun":
            moved = kicked + 0.5 * dt * (slope + drift(moved, time + dt))
        x = moved
    return x


def diffusion_at(form: str, at: Point, time: float) -> Tensor:
    """w(t): sigma, that of DDPM's SDE (sbdm), 1 - t, or 1."""
    if form == "sigma":
        return at.sigma
    if form == "sbdm":
        return -at.sigma * at.det / at.alpha
    return torch.full_like(at.sigma, 1 - time if form == "linear" else 1.0)


def _moved(x: Tensor, dt: float, shares: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for share, slope in zip(shares, slopes, strict=True):
        if share:
            x = x + dt * share * slope
    return x


def _normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on the host, so that a seed means the same on any device."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
