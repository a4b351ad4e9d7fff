import pytest
import torch

from tests.models import tiny
from tests.models.conftest import Build
from triptych_models.freeze import freeze, parameter_parts


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_part(build: Build, tied: bool) -> None:
    model = build(tied=tied)
    parts = parameter_parts(model)
    assert parts.keys() == dict(model.named_parameters()).keys()
    for name, part in parts.items():
        expected = "projector" if "merger" in name else "vision" if "visual" in name else "language"
        assert part == expected, name


@pytest.mark.parametrize(
    "frozen", [["vision"], ["vision", "language"], ["projector"], ["vision", "projector"]]
)
def test_frozen_parts_get_no_gradient_and_the_rest_the_same(
    build: Build, documents: list[tiny.Document], frozen: list[str]
) -> None:
    batch = tiny.pack(documents, 96)
    free, model = build(), build(freeze=frozen)
    free(**batch).loss_sum.backward()
    model(**batch).loss_sum.backward()
    parts = parameter_parts(model)
    for (name, p), q in zip(model.named_parameters(), free.parameters(), strict=True):
        if parts[name] in frozen:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad)


def test_frozen_tower_leaves_no_graph(build: Build, documents: list[tiny.Document]) -> None:
    model = build(freeze=["vision"])
    outputs: list[torch.Tensor] = []
    model.hf.model.visual.blocks[-1].register_forward_hook(lambda *x: outputs.append(x[-1]))
    model(**tiny.pack(documents, 96))
    assert [x.requires_grad for x in outputs] == [False]


def test_unknown_part_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match=r"must be among .*got 'experts'"):
        freeze(build(), ["experts"])
