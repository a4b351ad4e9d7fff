"""What is computed, against plain fp64 numpy on whole tensors."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tools.average_folders import average, read_weights, weights, write_folder
from triptych_core.averaging.coefficients import ema, uniform, weighted, window
from triptych_core.averaging.plan import resident_bytes
from triptych_core.averaging.safetensors_file import read_header
from triptych_core.averaging.verify import verify_output

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LARGE = "model.embed.weight"


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def models(request, tmp_path_factory) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """A base and three that were tuned from it."""
    root = tmp_path_factory.mktemp("models")
    base = weights(0, request.param)
    tensors = [base, *(weights(seed, request.param, near=base) for seed in (1, 2, 3))]
    paths = [write_folder(root / f"step-{100 * n}", t) for n, t in enumerate(tensors)]
    return paths, tensors


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def check(found: dict[str, Tensor], wanted: dict[str, np.ndarray], size: float = 8.0) -> None:
    """Each element is that of fp64 but for steps in fp32, of numbers to `size`, and the dtype."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        allowed = 0.5 * torch.finfo(found[name].dtype).eps * np.abs(values) + 10 * size * 2**-24
        error = np.abs(wide(found[name]) - values)
        assert found[name].shape == values.shape
        assert (error <= allowed).all(), (name, float(error.max(initial=0)))


def weighted_sum(tensors: list[dict[str, Tensor]], factors: Any) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(sum(f * wide(t[name]) for f, t in zip(factors, tensors, strict=True)))
        for name in tensors[0]
    }


def test_uniform(models, tmp_path):
    paths, tensors = models
    found = average(tmp_path / "out", *paths[1:])
    check(found, weighted_sum(tensors[1:], [1 / 3] * 3))
    assert {t.dtype for t in found.values()} == {tensors[0][LARGE].dtype}
    assert "elements computed again" in verify_output(tmp_path / "out", full=True)


def test_weighted_ema_and_window(models, tmp_path):
    paths, tensors = models
    found = average(tmp_path / "w", *paths, method="weighted", weights=(1.5, -1, 0.25, 0.25))
    check(found, weighted_sum(tensors, [1.5, -1, 0.25, 0.25]))
    found = average(tmp_path / "n", *paths, method="weighted", weights=(1, 2, 3, 4), normalize=True)
    check(found, weighted_sum(tensors, [0.1, 0.2, 0.3, 0.4]))
    # Named newest first: both methods go by the steps in the folders' names.
    found = average(tmp_path / "e", *paths[::-1], method="ema", decay=0.8)
    check(found, weighted_sum(tensors, [0.8**3, 0.2 * 0.8**2, 0.2 * 0.8, 0.2]))
    found = average(tmp_path / "c", *paths[::-1], method="window", curve="minus-sqrt")
    roots = [math.sqrt(k / 4) for k in range(5)]
    falls = [later - earlier for earlier, later in itertools.pairwise(roots)]
    check(found, weighted_sum(tensors, falls))
    for name in "wnec":
        verify_output(tmp_path / name, full=True)


def test_last_spacing_and_window_choose(models, tmp_path):
    paths, tensors = models
    found = average(tmp_path / "last", *paths, last=2)
    check(found, weighted_sum(tensors[2:], [0.5, 0.5]))
    found = average(tmp_path / "spaced", *paths, last=2, spacing=150)
    check(found, weighted_sum([tensors[1], tensors[3]], [0.5, 0.5]))
    found = average(tmp_path / "window", *paths, window=250)
    check(found, weighted_sum(tensors[1:], [1 / 3] * 3))
    with pytest.raises(ValueError, match=r"--last: must be at most the 2 inputs .* got 3"):
        average(tmp_path / "none", *paths, last=3, spacing=200)


def test_task_arithmetic(models, tmp_path):
    paths, tensors = models
    options = {"method": "task-arithmetic", "base": paths[0], "scale": 0.7}
    found = average(tmp_path / "out", *paths[1:], weights=(1, 0.5, -0.3), **options)
    base = weighted_sum(tensors[:1], [1])
    wanted = {
        name: value
        + 0.7
        * sum(f * (wide(t[name]) - value) for f, t in zip((1, 0.5, -0.3), tensors[1:], strict=True))
        for name, value in base.items()
    }
    check(found, wanted)
    verify_output(tmp_path / "out", full=True)


def test_slerp(models, tmp_path):
    paths, tensors = models
    found = average(tmp_path / "out", *paths[1:3], method="slerp", position=0.3)
    wanted = {}
    for name in tensors[0]:
        one, two = wide(tensors[1][name]), wide(tensors[2][name])
        norms = np.linalg.norm(one) * np.linalg.norm(two)
        cosine = (one * two).sum() / norms if norms else 1.0
        angle = np.arccos(np.clip(cosine, -1, 1))
        if np.sin(angle) < 1e-6:
            wanted[name] = np.asarray(0.7 * one + 0.3 * two)
        else:
            ours, theirs = np.sin(0.7 * angle), np.sin(0.3 * angle)
            wanted[name] = (ours * one + theirs * two) / np.sin(angle)
    check(found, wanted)
    verify_output(tmp_path / "out", full=True)


def test_ties(models, tmp_path):
    paths, tensors = models
    # Quarters are exact: on the grid of 16-bit numbers differences may add up to zero.
    factors = (0.5, 0.25, 0.25)
    options = {"method": "ties", "base": paths[0], "density": 0.3, "scale": 0.9}
    found = average(tmp_path / "out", *paths[1:], weights=factors, **options)
    wanted = {}
    for name, tensor in tensors[0].items():
        base, changes = tensor.float().numpy(), []
        for other in tensors[1:]:
            change = other[name].float().numpy() - base  # in fp32: ties at the edge are the same
            kept = max(1, round(0.3 * change.size))
            if change.size:
                edge = np.sort(np.abs(change), axis=None)[-kept]
                change = np.where(np.abs(change) >= edge, change, 0)
            changes.append(change.astype(np.float64))
        total = sum(f * c for f, c in zip(factors, changes, strict=True))
        agree = [(np.sign(c) == np.sign(total)) & (c != 0) for c in changes]
        counts = sum(f * a for f, a in zip(factors, agree, strict=True))
        merged = sum(f * c * a for f, c, a in zip(factors, changes, agree, strict=True))
        wanted[name] = base + 0.9 * np.divide(
            merged, counts, out=np.zeros_like(merged), where=counts > 0
        )
    check(found, wanted)
    verify_output(tmp_path / "out", full=True)


def test_identical_inputs_come_out_bit_equal(models, tmp_path):
    _, tensors = models
    for number in (2, 3, 5, 7):
        paths = [write_folder(tmp_path / f"{number}-{n}", tensors[1]) for n in range(number)]
        found = average(tmp_path / f"out-{number}", *paths)
        for name, tensor in tensors[1].items():
            # A sum of fp32 numbers is rounded at each.
            steps = number if tensor.dtype == torch.float32 else 0
            error = (found[name].double() - tensor.double()).abs()
            assert (error <= steps * 2**-24 * tensor.double().abs()).all(), (number, name)


def test_modules_have_their_own_weights_and_may_be_left_out(models, tmp_path):
    paths, tensors = models
    found = average(
        tmp_path / "out",
        *paths,
        module_weights=(("*.mlp.*", (1, 0, 0, 0)), ("model.layers.*", (0, 0, 0.5, 0.5))),
        exclude=("model.scale",),
        copy_from=paths[2],
        dtype="fp32",
        keep_fp32=("*norm*",),
    )
    wanted = weighted_sum(tensors, uniform(4))
    wanted["model.layers.0.mlp.weight"] = wide(tensors[0]["model.layers.0.mlp.weight"])
    name = "model.layers.0.norm.weight"
    wanted[name] = 0.5 * wide(tensors[2][name]) + 0.5 * wide(tensors[3][name])
    wanted["model.scale"] = wide(tensors[2]["model.scale"])
    check(found, wanted)
    verify_output(tmp_path / "out", full=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    found = average(tmp_path / "mixed", *paths, dtype="bf16", keep_fp32=("*norm*",))
    assert {name for name, t in found.items() if t.dtype == torch.float32} == {name}
    assert json.loads((tmp_path / "mixed/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("options", [{}, {"method": "ties"}, {"method": "slerp"}], ids=str)
def test_threads_and_memory_do_not_change_a_byte(models, tmp_path, options):
    paths, _ = models
    inputs = paths[1:] if options.get("method") != "slerp" else paths[1:3]
    base = {"base": paths[0]} if options.get("method") == "ties" else {}
    outputs = []
    for threads, spare in ((1, 8 << 30), (2, 4 << 30), (7, 225 << 20)):
        output = tmp_path / f"out-{threads}"
        memory = resident_bytes() + spare  # the last leaves room for fewer or smaller stretches
        average(output, *inputs, threads=threads, max_memory=memory, **base, **options)
        outputs.append((output / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_sharded_output_holds_the_same(models, tmp_path):
    paths, _ = models
    whole = average(tmp_path / "whole", *paths)
    cut = average(tmp_path / "cut", *paths, max_shard_size=350)
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    verify_output(tmp_path / "cut")


def test_tensors_begin_at_multiples_of_their_elements(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(3)}
    tensors |= {"c": torch.ones(1, dtype=torch.bool), "d": torch.ones(3, dtype=torch.float64)}
    paths = [write_folder(tmp_path / name, tensors) for name in ("one", "two")]
    found = average(tmp_path / "out", *paths)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    places = read_header(tmp_path / "out/model.safetensors")[0].values()
    assert all(stored.places[0].offset % stored.dtype.itemsize == 0 for stored in places)


def test_not_finite_results_are_refused(tmp_path):
    good = weights(1, torch.float32)
    for value, dtype in ((math.nan, "same"), (math.inf, "same"), (1e30, "fp16")):
        bad = {name: tensor.clone() for name, tensor in good.items()}
        bad[LARGE][300, 512] = value
        paths = [write_folder(tmp_path / f"{value}-{n}", t) for n, t in enumerate((good, bad))]
        with pytest.raises(ValueError, match=rf"{LARGE}: must be finite in torch"):
            average(tmp_path / f"out-{value}", *paths, dtype=dtype)
        assert not (tmp_path / f"out-{value}").exists()


def test_verify_finds_one_wrong_element(models, tmp_path):
    paths, _ = models
    average(tmp_path / "out", *paths)
    file = tmp_path / "out/model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size - 50)
        byte = opened.read(2)
        opened.seek(size - 50)
        opened.write(bytes([byte[0], byte[1] ^ 0x40]))
    with pytest.raises(ValueError, match=r"must be (what the inputs give|finite)"):
        verify_output(tmp_path / "out", full=True)
    os.truncate(file, size - 2)
    with pytest.raises(ValueError, match=r"model.safetensors: must"):
        verify_output(tmp_path / "out")


def test_coefficients():
    assert uniform(4) == [0.25] * 4
    assert weighted((1, 3), 2, normalize=True) == [0.25, 0.75]
    with pytest.raises(ValueError, match=r"--weights: must add up to 1, got 4"):
        weighted((1, 3), 2, normalize=False)
    with pytest.raises(ValueError, match=r"--weights: must be one number for each of 3 inputs"):
        weighted((1, 3), 3, normalize=True)
    assert sum(ema(0.9, 7)) == pytest.approx(1)
    for curve in ("linear", "cosine", "minus-sqrt"):
        for steps in ([100, 200, 300], [1, 2, 50, 51], [7]):
            found = window(curve, steps)
            assert sum(found) == pytest.approx(1) and min(found) > 0
    assert window("linear", [100, 200, 300, 400]) == pytest.approx([0.25] * 4)
    # A decay that begins steeply leaves the later updates little: the early checkpoints count.
    assert window("minus-sqrt", [1, 2, 3]) == sorted(window("minus-sqrt", [1, 2, 3]), reverse=True)


def test_window_is_the_decay_it_stands_for():
    """Updates of a constant rate, summed with the curve's factors, give the same model."""
    updates = np.random.default_rng(0).normal(size=(6, 5))
    models = np.cumsum(updates, axis=0)
    factors = [1, *(math.cos(math.pi * k / 12) ** 2 for k in range(1, 6))]
    assert np.allclose(window("cosine", range(6)) @ models, np.array(factors) @ updates)


def test_read_weights_reads_all(models):
    paths, tensors = models
    assert read_weights(paths[0]).keys() == tensors[0].keys()
