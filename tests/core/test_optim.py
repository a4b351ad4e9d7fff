"""Parameter groups: who decays, who learns how fast."""

import pytest
import torch
from torch import nn

from triptych_core.config import OptimConfig
from triptych_core.optim import build_adamw, parameter_groups, set_learning_rate


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "vision": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
            "language": nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4, bias=False)),
        }
    )


def part(name: str) -> str:
    return name.split(".")[0]


def groups_of(config: OptimConfig):
    return {g["name"]: g for g in parameter_groups(model().named_parameters(), config, part)}


def test_norms_and_biases_never_decay():
    groups = groups_of(OptimConfig(weight_decay=0.1))
    assert set(groups) == {"vision/decay", "vision/no_decay", "language/decay"}
    assert groups["vision/no_decay"]["weight_decay"] == 0.0
    assert len(groups["vision/no_decay"]["params"]) == 3  # bias, norm weight, norm bias
    assert groups["language/decay"]["weight_decay"] == 0.1


def test_each_part_has_its_own_peak_and_the_scale_multiplies_it():
    optimizer = build_adamw(
        parameter_groups(
            model().named_parameters(), OptimConfig(lr=1.0, lr_by_part={"vision": 0.1}), part
        ),
        OptimConfig(lr=1.0),
    )
    set_learning_rate(optimizer, 0.5)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "vision/decay": 0.05,
        "vision/no_decay": 0.05,
        "language/decay": 0.5,
    }


def test_frozen_parameters_are_in_no_group():
    frozen = model()
    frozen["vision"].requires_grad_(False)
    groups = parameter_groups(frozen.named_parameters(), OptimConfig(), part)
    assert [g["name"] for g in groups] == ["language/decay"]


def test_a_part_that_does_not_train_is_refused():
    with pytest.raises(ValueError, match="did you mean 'vision'"):
        parameter_groups(model().named_parameters(), OptimConfig(lr_by_part={"vison": 0.1}), part)


def test_a_partitioned_parameter_is_judged_by_its_whole_shape():
    matrix = nn.Parameter(torch.empty(0))
    matrix.ds_shape = torch.Size([4, 4])  # what ZeRO-3 leaves behind
    (group,) = parameter_groups([("w", matrix)], OptimConfig(weight_decay=0.1), lambda name: "all")
    assert group["name"] == "all/decay"
