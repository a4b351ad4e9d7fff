"""From noise to data: explicit Runge-Kutta steps of the ODE, and steps of an SDE.

Both run t from 0 to 1 along a model's velocity. The SDE (SiT, section 2.4) adds w(t) times the
score to the velocity and noise of variance 2 w(t) dt: at every time its samples spread alike.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .config import SamplerConfig
from .interpolant import Point, data_of, noise_of, point, shifted, time_bounds
from .model import Condition, DiffusionModel
from .objective import mix

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
    given: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """Data (N, C, ...) from noise of its shape, fp32.

    generator: on the host, for the noise of an SDE. given: first frames (N, C, f, ...) of videos,
    which stay as they are; source: (N, C, ...), of which a `strength` below 1 begins; both by the
    ODE alone.
    """
    path, prediction = model.objective.path, model.objective.prediction
    low, high = time_bounds(path, prediction)
    frames = 0 if given is None else given.shape[2]
    even = torch.linspace(0, 1, config.steps + 1, dtype=torch.float64)
    times = (low + (high - low) * shifted(even, config.shift)).tolist()
    if config.strength < 1:
        assert source is not None and config.method in METHODS
        times = times[config.steps - max(1, int(config.steps * config.strength)) :]
        at_first = point(path, noise.new_full((1,), times[0]), noise.ndim)
        noise = mix(source, noise, at_first)
    if given is not None:
        noise = torch.cat([given, noise[:, :, frames:]], dim=2)

    def velocity(x: Tensor, time: float) -> Tensor:
        return model.velocity(x, time, config.guidance, condition, frames)

    if config.method in METHODS:
        return integrate(velocity, noise, times, METHODS[config.method])
    assert given is None
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


def integrate(velocity: Velocity, x: Tensor, times: Sequence[float], method: Tableau) -> Tensor:
    """dx = velocity(x, t) dt from the first of the times to the last, a step to each."""
    for time, following in pairwise(times):
        dt, slopes = following - time, list[Tensor]()
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
