"""Inputs of layers in host memory: what stays on the device, what comes back, and when."""

import weakref

import pytest
import torch

from tests.models import tiny
from tests.models.conftest import Build
from triptych_models.offload import InputStore


def test_inputs_leave_as_layers_run_and_come_back_as_they_are_needed() -> None:
    store = InputStore()
    values = [torch.full((1, 4, 2), float(n)) for n in range(4)]
    kept, alive = [], []
    for n, value in enumerate(values):
        x = value.clone().requires_grad_(n > 0)
        alive.append(weakref.ref(x))
        kept.append(store.keep(x))
        assert kept[-1].take() is x  # the forward's
        del x
        assert [ref() is not None for ref in alive] == [False] * n + [True]
    for _ in range(2):  # backward twice, as with retain_graph
        for n in (3, 2, 1, 0):
            again = kept[n].take()
            assert torch.equal(again, values[n])
            assert again.requires_grad == (n > 0) and again.is_leaf
            assert [k.is_here for k in kept] == [i == n - 1 for i in range(4)]  # on its way


def gradients(model, batch, checkpointing: str) -> list[torch.Tensor]:
    model.zero_grad()
    model.set_checkpointing(checkpointing)
    model(**batch).loss_sum.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_are_those_of_full_checkpointing(build: Build, documents) -> None:
    model = build().train()
    batch = tiny.pack(documents, 96)
    for got, wanted in zip(
        *(gradients(model, batch, way) for way in ("offload", "full")), strict=True
    ):
        assert torch.equal(got, wanted)


def test_chunked_mlps_give_the_same(build: Build, documents) -> None:
    batch = tiny.pack(documents, 96)
    plain, chunked = build(dtype=torch.float64).train(), build(dtype=torch.float64).train()
    chunked.set_mlp_chunks(5)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in chunked.named_parameters()]
    for way in ("none", "full", "offload"):
        for got, wanted in zip(
            gradients(chunked, batch, way), gradients(plain, batch, way), strict=True
        ):
            assert (got - wanted).norm() <= 1e-12 * wanted.norm()
    with torch.no_grad():
        torch.testing.assert_close(chunked(**batch).loss_sum, plain(**batch).loss_sum)


@pytest.mark.gpu
def test_on_a_device_inputs_are_in_host_memory(build: Build) -> None:
    from triptych_kernels import use_backend

    torch.use_deterministic_algorithms(True, warn_only=True)
    model = build(dtype=torch.bfloat16).cuda().train()
    batch = tiny.pack([tiny.document(n, words=400) for n in range(20)], 8192)
    on_device = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in batch.items()}
    with use_backend(attention="sdpa"):
        for _ in range(3):
            offloaded, kept = (gradients(model, on_device, way) for way in ("offload", "full"))
            for got, wanted in zip(offloaded, kept, strict=True):
                assert torch.equal(got, wanted)
