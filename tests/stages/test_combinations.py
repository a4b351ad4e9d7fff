"""Every combination of README's table: a step of it equals the step of one rank that has all.

Loss, clip norm, every gradient and every master after the update, in fp32 to 1e-5 of stock
transformers and AdamW in fp64; with Muon or bf16 of one rank's, in bf16 as far as the other order
of its roundings allows.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import deepspeed  # noqa: F401  once, and not on every rank
import pytest

from tests.models import tiny
from tests.ranks import run_ranks
from tests.stages.combinations import COMPILED, EXACT, MIXTURES, MODES, REFUSED, refusal, words
from tests.stages.one_step import Step, compare, on_a_rank
from tests.stages.reference import Reference
from tests.tiny import ROOT

ROUNDING = 3e-2  # of bf16 in another order
FROM_FP32 = 6e-2  # of bf16 with experts; on one rank alone it is up to 4.2e-2
NEWTON_SCHULZ = 1e-3  # it rounds to bf16: a last bit of a small gradient is a last bit of that


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with images, 4 query heads and 2 key heads."""
    return tiny.write_model_dir(tmp_path_factory.mktemp("combinations") / "model", tied=True)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Such a model with 4 experts in two of three layers."""
    return tiny.write_vl_moe_model_dir(tmp_path_factory.mktemp("experts") / "model", tied=True)


Steps = dict[tuple[str, ...], Step]


def steps_of_one_rank(folder: Path, kinds: list[tuple[str, ...]]) -> Steps:
    """By what changes the numbers: a step of one rank on two rows, nothing divided; and in fp64."""
    runs = [
        [*words("rows", " ".join(("0", *kind))), "engine.gradient_accumulation_steps=2"]
        for kind in kinds
    ]
    (steps,) = run_ranks(on_a_rank, 1, folder, folder / "one", runs)
    return {(): Reference(folder).step((0, 1)), **dict(zip(kinds, steps, strict=True))}


@pytest.fixture(scope="module")
def reference(folder) -> Steps:
    return steps_of_one_rank(folder, [("muon",), ("states",), ("bf16",), ("states", "bf16")])


@pytest.fixture(scope="module")
def reference_of_experts(mixture) -> Steps:
    return steps_of_one_rank(mixture, [("muon",), ("states",), ("bf16",)])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in MIXTURES])
def test_a_step_equals_that_of_one_rank(folder, reference, mode):
    check_steps(folder, reference, mode)


@pytest.mark.parametrize("mode", MIXTURES)
def test_a_step_with_divided_experts_too(mixture, reference_of_experts, mode):
    check_steps(mixture, reference_of_experts, mode)


def check_steps(folder: Path, reference: Steps, mode: str) -> None:
    world_size = 4 if mode == "both" else 2
    runs = [words(mode, run) for run in EXACT[mode]]
    results = run_ranks(on_a_rank, world_size, folder, folder / mode, runs)
    for run, *by_rank in zip(EXACT[mode], *results, strict=True):
        kind = tuple(name for name in ("muon", "states", "bf16") if name in run.split())
        assert len({found.norm for found in by_rank}) == 1, f"{mode}: {run}: norms differ"
        off = ROUNDING if "bf16" in kind else 1e-5
        off_masters = max(off, NEWTON_SCHULZ) if "muon" in kind else off
        for found in by_rank:
            compare(found, reference[kind], f"{mode}: {run}", off, off_masters)
            if "bf16" in kind and mode in MIXTURES:
                compare(found, reference[()], f"{mode}: {run}, against fp32", FROM_FP32)


@pytest.mark.parametrize("case", REFUSED, ids=" ".join)
def test_what_does_not_go_together_is_refused(case):
    assert " must " in refusal(*case)


def test_compiled_layers_too(folder, mixture, reference, reference_of_experts):
    for path, steps in ((folder, reference), (mixture, reference_of_experts)):
        (path / "reference").write_bytes(pickle.dumps(steps[()]))
    script = ROOT / "tests/stages/compiled_combinations.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [*command, script, folder, mixture],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:6000]
    for mode, runs in COMPILED.items():
        for run in runs:
            assert done.stdout.count(f"{mode}: {run}: as one rank") == 2
