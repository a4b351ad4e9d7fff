"""An infinite weight, and a norm at 0, are named by their modules; sound numbers are not."""

import sys

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    """Finite at 0, where its gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum(-1).sqrt()


def main() -> int:
    torch.manual_seed(0)
    faults = []
    for where, model, wanted in (
        ("nowhere", stack(), (None, None)),
        ("in a weight", spoiled(stack()), ("2", "2")),
        ("in a backward", nn.Sequential(nn.Linear(3, 4), Zero(), Norm()), (None, "2")),
    ):
        found = ends(model)
        print(f"{where}: forward {found[0]}, backward {found[1]}")
        if found != wanted:
            faults.append(where)
    return int(bool(faults))


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))


def spoiled(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model[2].weight[1, 1] = torch.inf
    return model


class Zero(nn.Module):
    """Where a mask multiplies everything away."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def ends(model: nn.Module) -> tuple[str | None, str | None]:
    """Modules where numbers first end, as `--replay` looks for them."""
    from triptych_core.replay.numbers import Numbers

    numbers = Numbers()
    with numbers.watched(model):
        model(torch.randn(5, 3)).sum().backward()
    return numbers.first_forward(), numbers.first_backward()


if __name__ == "__main__":
    sys.exit(main())
