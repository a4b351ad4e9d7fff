"""What every diffusion family is: a network that predicts along a path, with its loss inside."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpointing import Checkpointed, compile_forward
from ..freeze import Holder
from ..offload import InputStore
from ..output import LossOutput
from ..weights import Gather, whole
from .config import ObjectiveConfig
from .interpolant import point, to_velocity
from .objective import draw_times, mix, path_point, squared_error

Condition = dict[str, Tensor]


class DiffusionModel(Checkpointed):
    """`self.net` and its objective; a family says what its parts are and how it is conditioned."""

    def __init__(self, net: nn.Module, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.net = net
        self.objective = objective
        self.input_store = InputStore()

    def predict(
        self, x: Tensor, times: Tensor, condition: Condition, given_frames: int = 0
    ) -> Tensor:
        """What the objective says the model gives, of x's shape (N, C, ...) at times (N,).

        The first given_frames of a video are data, whatever the time.
        """
        raise NotImplementedError

    def initialize(self, seed: int, gather: Gather = whole) -> None:
        """Draw first weights: the same on any device and number of ranks."""
        raise NotImplementedError

    def load(self, path: Path, gather: Gather = whole) -> None:
        """Read weights of the family's public layout. Raises ValueError for others."""
        raise NotImplementedError

    def export(
        self,
        out_dir: Path,
        *,
        dtype: torch.dtype = torch.float32,
        gather: Gather = whole,
        is_main: bool = True,
    ) -> None:
        """Write weights in the family's public layout; every rank calls it, is_main writes."""
        raise NotImplementedError

    def sample_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample's tensors by name, where the net's own shape says them; else none."""
        return {}

    def check_data(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless tensors of these shapes, by name, are what the net takes."""
        raise NotImplementedError

    def drawn_condition(self, batch: Mapping[str, Any], count: int) -> Condition:
        """A condition for count samples that are to be seen, maybe that of a batch's."""
        raise NotImplementedError

    def dropped(self, condition: Condition, drop: Tensor) -> Condition:
        """The condition, without what it says where drop (N,) is true."""
        raise NotImplementedError

    def parts(self) -> dict[str, list[Holder]]:
        """Modules of each part; every parameter is in exactly one."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """Every layer: what repeats, and runs as a whole."""
        raise NotImplementedError

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of a batch, from shapes alone."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """What the weights mean."""
        return {"objective": self.objective.model_dump()}

    def forward(
        self,
        *,
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        drops: Tensor,
        weights: Tensor,
        num_targets: int,
        given_frames: int = 0,
        **condition: Tensor,
    ) -> LossOutput:
        """Summed loss of N samples, fp32.

        latents, noise (N, C, ...); times and drops (N,), uniform in [0, 1): when, and whether
        without its condition, a sample is learnt; weights (N,): 0 for a sample that is not there.
        Nothing is dropped in evaluation. num_targets: elements of the latents that are there, less
        those of the first given_frames of videos (N, C, F, ...), which the model is shown.
        """
        self.input_store = InputStore()
        moments = draw_times(times, self.objective)
        at = path_point(moments, latents, self.objective)
        drop = drops < (self.objective.condition_dropout if self.training else 0.0)
        x = mix(latents, noise, at)
        if given_frames:
            x = torch.cat([latents[:, :, :given_frames], x[:, :, given_frames:]], dim=2)
        out = self.predict(x, moments, self.dropped(condition, drop), given_frames)
        error = squared_error(out.to(latents.dtype), latents, noise, at, self.objective)
        error = error[:, :, given_frames:] if given_frames else error
        losses = error.flatten(1).sum(1) * weights
        return LossOutput(losses.sum(), num_targets, {}, losses.detach())

    def velocity(
        self, x: Tensor, time: float, guidance: float, condition: Condition, given_frames: int = 0
    ) -> Tensor:
        """Where x (N, C, ...) moves at a time, guided away from what has no condition."""
        times = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
        if guidance == 1.0:
            return self._velocity(x, times, condition, given_frames)
        everyone = torch.ones(len(x), dtype=torch.bool, device=x.device)
        without = self.dropped(condition, everyone)
        both = {name: torch.cat([condition[name], without[name]]) for name in without}
        found = self._velocity(torch.cat([x, x]), torch.cat([times, times]), both, given_frames)
        given, free = found.chunk(2)
        return free + guidance * (given - free)

    def _velocity(
        self, x: Tensor, times: Tensor, condition: Condition, given_frames: int
    ) -> Tensor:
        out = self.predict(x, times, condition, given_frames).to(x.dtype)
        at = point(self.objective.path, times, x.ndim)
        moves = to_velocity(self.objective.prediction, out, x, at)
        if given_frames:
            moves = torch.cat([0 * x[:, :, :given_frames], moves[:, :, given_frames:]], dim=2)
        return moves

    def compile_layers(self) -> None:
        """Compile every layer in place."""
        self.is_compiled = True
        for layer in self.layers():
            compile_forward(layer)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are born in dtype, inside zero.Init too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
