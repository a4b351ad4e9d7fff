"""Samplers on data whose velocity is known: a normal distribution, along every path."""

import pytest
import torch
from torch import Tensor, nn

from triptych_models.diffusion.config import ObjectiveConfig, SamplerConfig
from triptych_models.diffusion.interpolant import data_of, noise_of, point, to_velocity
from triptych_models.diffusion.model import DiffusionModel
from triptych_models.diffusion.objective import draw_times
from triptych_models.diffusion.sampling import METHODS, integrate, sample

MEAN, SPREAD = 1.5, 0.4


class Normal(DiffusionModel):
    """Knows that all data is drawn from N(MEAN + label, SPREAD^2); label -1 says none."""

    def __init__(self, **fields) -> None:
        super().__init__(nn.Identity(), ObjectiveConfig(**fields))

    def predict(self, x: Tensor, times: Tensor, condition: dict, given_frames: int = 0) -> Tensor:
        at = point(self.objective.path, times, x.ndim)
        mean = MEAN + condition["labels"].view(-1, 1)
        excess = (x - at.alpha * mean) / (at.alpha**2 * SPREAD**2 + at.sigma**2)
        if self.objective.prediction == "velocity":
            data = mean + at.alpha * SPREAD**2 * excess
            return at.d_alpha * data + at.d_sigma * at.sigma * excess
        return -excess if self.objective.prediction == "score" else at.sigma * excess

    def dropped(self, condition: dict, drop: Tensor) -> dict:
        return {"labels": condition["labels"].masked_fill(drop, -1)}


def drawn(method: str, steps: int, count: int = 1, **fields) -> Tensor:
    sampler = {k: fields.pop(k) for k in ("guidance", "diffusion", "last_step") if k in fields}
    model = Normal(**fields)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    condition = {"labels": torch.zeros(count)}
    config = SamplerConfig(method=method, steps=steps, **sampler)
    return sample(model, noise, condition, config, generator)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_the_ode_carries_noise_to_data_whatever_is_predicted(path, prediction):
    found = drawn("dopri5", 60, 4000, path=path, prediction=prediction)
    assert abs(found.mean() - MEAN) < 0.03
    assert abs(found.std() - SPREAD) < 0.03


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("dopri5", 5)])
def test_a_method_has_its_order(method, order):
    start = torch.ones(1, dtype=torch.float64)
    exact = torch.e ** torch.tensor(0.5, dtype=torch.float64)  # of x' = t x from 0 to 1

    def error(steps: int) -> float:
        found = integrate(
            lambda x, t: t * x, start, [i / steps for i in range(steps + 1)], METHODS[method]
        )
        return float((found - exact).abs())

    assert abs(torch.log2(torch.tensor(error(8) / error(16))) - order) < 0.4


@pytest.mark.parametrize(
    ("path", "diffusion"),
    [("vp", "sigma"), *(("linear", form) for form in ("sigma", "sbdm", "linear", "constant"))],
)
def test_the_sde_spreads_as_the_data_does(path, diffusion):
    fields = {"path": path, "prediction": "noise", "diffusion": diffusion, "last_step": 0.01}
    found = drawn("sde_heun", 100, 4000, **fields)
    assert abs(found.mean() - MEAN) < 0.05
    assert abs(found.std() - SPREAD) < 0.05


def test_sde_euler_is_of_the_same_spread_and_of_other_samples():
    fields = {"path": "gvp", "prediction": "score"}
    found = drawn("sde_euler", 100, 4000, **fields)
    assert abs(found.mean() - MEAN) < 0.05
    assert abs(found.std() - SPREAD) < 0.05
    assert torch.equal(found, drawn("sde_euler", 100, 4000, **fields))
    assert (found - drawn("dopri5", 60, 4000, **fields)).abs().mean() > 0.1


def test_guidance_moves_away_from_what_has_no_condition():
    model = Normal(path="gvp", prediction="noise")
    x, given = torch.tensor([[0.3], [2.0]]), {"labels": torch.tensor([0.0, 3.0])}
    without = {"labels": torch.tensor([-1.0, -1.0])}
    cond, free = (model.velocity(x, 0.4, 1.0, c) for c in (given, without))
    torch.testing.assert_close(model.velocity(x, 0.4, 4.0, given), free + 4.0 * (cond - free))


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_data_and_noise_come_back_from_x_and_its_velocity(path):
    data, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    at = point(path, torch.tensor([0.001, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64), 2)
    x, velocity = at.alpha * data + at.sigma * noise, at.d_alpha * data + at.d_sigma * noise
    torch.testing.assert_close(data_of(velocity, x, at), data)
    torch.testing.assert_close(noise_of(velocity, x, at), noise)
    torch.testing.assert_close(to_velocity("noise", noise, x, at), velocity)
    torch.testing.assert_close(to_velocity("score", -noise / at.sigma, x, at), velocity)


def test_times_are_shifted_towards_noise():
    uniform = torch.tensor([0.25, 0.5, 0.75])
    found = draw_times(uniform, ObjectiveConfig(shift=3.0))
    level = 3 * (1 - uniform) / (1 + 2 * (1 - uniform))
    torch.testing.assert_close(found, 1 - level)
    normal = draw_times(uniform, ObjectiveConfig(times="logit_normal"))
    torch.testing.assert_close(
        normal.logit(), torch.tensor([-0.6745, 0.0, 0.6745]), atol=1e-4, rtol=0
    )
