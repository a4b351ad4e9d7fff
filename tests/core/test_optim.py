"""Parameter groups: who decays, who learns how fast."""

import pytest
import torch
from torch import nn

from triptych_core.config import OptimConfig, ScheduleConfig, StageConfig, load_config
from triptych_core.optim.groups import build_optimizer, parameter_groups, set_learning_rate


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


HALF = ScheduleConfig(kind="linear", warmup_steps=2)  # the first of two steps of warm-up


def test_each_part_has_its_own_peak_and_the_schedule_multiplies_it():
    optimizer = build_optimizer(
        parameter_groups(
            model().named_parameters(), OptimConfig(lr=1.0, lr_by_part={"vision": 0.1}), part
        ),
        OptimConfig(lr=1.0),
    )
    set_learning_rate(optimizer, HALF, 1, 10)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "vision/decay": 0.05,
        "vision/no_decay": 0.05,
        "language/decay": 0.5,
    }


def test_a_group_rests_until_its_first_step_and_is_then_as_new():
    """Nothing of it moves, decays or is counted; its schedule begins with that step."""
    twins = [model(), model()]
    twins[1].load_state_dict(twins[0].state_dict())
    config = OptimConfig(lr=0.1, weight_decay=0.5)

    def optimizer_of(net, first_step):
        groups = parameter_groups(net.named_parameters(), config, part)
        for group in groups:
            group["first_step"] = first_step
        return build_optimizer(groups, config)

    late, new = (optimizer_of(net, first) for net, first in zip(twins, (4, 1), strict=True))
    for step in range(1, 8):
        for optimizer, net, at, last in ((late, twins[0], step, 10), (new, twins[1], step - 3, 7)):
            if at < 1:
                continue
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, float(step))
            set_learning_rate(optimizer, HALF, at, last)
            optimizer.step()
        for ours, theirs in zip(*(net.parameters() for net in twins), strict=True):
            assert torch.equal(ours, theirs), step
        assert bool(late.state) == (step > 3)


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


def test_muon_takes_the_matrices_it_is_given_at_a_rate_of_their_own():
    config = OptimConfig(
        name="muon", lr=1.0, lr_by_part={"vision": 0.1}, weight_decay=0.2, muon={"lr": 5.0}
    )
    matrices = {"vision.0.weight": [(4, 4)], "language.1.weight": [(2, 4), (2, 4)]}
    named = model().named_parameters()
    groups = {g["name"]: g for g in parameter_groups(named, config, part, matrices)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "vision/muon": (0.5, 0.2),
        "vision/no_decay": (0.1, 0.0),
        "language/decay": (1.0, 0.2),  # the embedding
        "language/muon": (5.0, 0.2),
    }
    assert groups["language/muon"]["matrices"] == [[(2, 4), (2, 4)]]


def test_muon_is_refused_where_states_are_on_the_host():
    with pytest.raises(ValueError, match=r"^optim.name: must be adamw with engine.zero.offload"):
        load_config(StageConfig, None, ["optim.name=muon", "engine.zero.offload_optimizer=true"])


def test_bf16_states_are_refused_on_the_host():
    with pytest.raises(ValueError, match=r"^optim.state_dtype: must be fp32 with engine.zero.offl"):
        load_config(
            StageConfig, None, ["optim.state_dtype=bf16", "engine.zero.offload_optimizer=true"]
        )
