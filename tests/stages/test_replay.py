"""`--replay`: the loss of a step again to the last bit, its samples, and where numbers end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401, once for all forked ranks

from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards, sft_stage
from triptych_core.replay.numbers import Numbers

STEPS = 6


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("replay")
    make_model_dir(path / "model")
    make_shards(path / "train", 40)
    return path


def words_for(workspace: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *(f"run.dir={run_dir}", "run.device=cpu", f"run.steps={STEPS}", "checkpoint.every=3"),
        *(f"model.path={workspace / 'model'}", "model.init=random", "export=false"),
        *(f"data.shards=[{workspace / 'train/shards'}]", "data.seq_len=256", "data.num_workers=0"),
        *("engine.precision=fp32", "optim.lr=1", "optim.ema_decay=0.9", *more),
    ]


def run_stage(words: list[str]) -> None:
    from triptych_core.config import load_config

    stage = sft_stage()
    stage.main(load_config(stage.SftConfig, None, words))


def replays(words: list[str], *several: list[str]) -> list[str]:
    """What each replay with more words is refused for; empty if it is not."""
    from triptych_core.config import load_config

    stage = sft_stage()
    import planning
    import replaying
    import replaying_rows

    said = []
    for more in several:
        config, runtime, _ = planning.begin(load_config(stage.SftConfig, None, [*words, *more]))
        try:
            replaying.replay_step(config, runtime, replaying_rows.ROWS)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def replayed(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / f"replay/step-{step:06d}.json").read_text())


def files(run_dir: Path) -> dict[str, bytes]:
    """All of a run but its replays."""
    every = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(p): p.read_bytes() for p in every if "replay" not in p.parts}


@pytest.fixture(scope="module", params=[0])
def run(request, workspace) -> tuple[Path, list[str]]:
    """Two ranks, two packs each, of which some step is called a spike; its folder and words."""
    run_dir = workspace / f"run-{request.param}"
    spikes = ["loss_guard.window=8", "loss_guard.min_steps=2", "loss_guard.sigma=0.01"]
    words = words_for(workspace, run_dir, *spikes, f"engine.zero.stage={request.param}")
    words += ["engine.gradient_accumulation_steps=2", "export=true"]
    run_ranks(run_stage, 2, words)
    return run_dir, words


def test_a_step_is_run_again_to_the_last_bit_and_the_run_stays_as_it_is(run, capfd):
    run_dir, words = run
    before = files(run_dir)
    lines = {line["step"]: line for line in map(json.loads, (run_dir / "metrics.jsonl").open())}
    last = [json.loads(line) for line in (run_dir / "skipped.jsonl").open()][-1]
    steps = [2, 4, last["step"]]
    asked = (["replay.step=last"], *([f"replay.step={step}"] for step in (2, 4)))
    assert run_ranks(replays, 2, words, *asked) == [[""] * 3] * 2
    for step in steps:
        found = replayed(run_dir, step)
        assert found["is_exact"] and (found["forward"], found["backward"]) == ({}, {})
        for key in ("loss", "grad_norm"):
            assert found[key] == lines[step][key]
        total = sum(norm**2 for norm in found["modules"].values()) ** 0.5
        assert total == pytest.approx(found["grad_norm"], rel=1e-5)
        targets = sum(sample["targets"] for sample in found["samples"])
        summed = sum((s["loss"] or 0.0) * s["targets"] for s in found["samples"])
        assert targets == lines[step]["num_targets"]
        assert summed / targets == pytest.approx(found["loss"], rel=1e-5)
    assert replayed(run_dir, last["step"])["verdict"] == last["why"]
    said = capfd.readouterr().out
    assert said.count("to the last bit as on record") == 6 and "not those on record" not in said
    assert files(run_dir) == before
    assert not (run_dir / "replay/unfinished").exists()


def test_one_process_runs_the_packs_of_all_ranks_and_other_weights(run, workspace):
    run_dir, words = run
    lines = {line["step"]: line for line in map(json.loads, (run_dir / "metrics.jsonl").open())}
    noted = [json.loads(line) for line in (run_dir / "skipped.jsonl").open()]
    keys = {key for line in noted if line["step"] == 5 for p in line["packs"] for key in p["keys"]}
    of_two = replayed(run_dir, 4)
    cut = workspace / f"cut-{run_dir.name}"
    shutil.copytree(run_dir, cut, ignore=shutil.ignore_patterns("replay", "export"))
    shutil.rmtree(cut / "checkpoints/step-000003")
    poisoned = poison(run_dir / "export", workspace / f"poisoned-{run_dir.name}")
    bad = [f"model.path={poisoned}", "model.init=pretrained", "replay.weights=model"]
    said = run_ranks(
        replays,
        1,
        words,
        ["replay.step=4"],
        ["replay.step=5", f"run.dir={cut}", "replay.weights=nearest"],
        ["replay.step=2", *bad],
        ["replay.step=3", "replay.weights=/nowhere"],
        ["replay.step=3", "run.dir=/nowhere"],
        ["replay.step=last", "run.dir=/nowhere"],
    )[0]
    assert said[:3] == [""] * 3 and "must be exact, nearest, model or a" in said[3]
    assert "must be the folder of a run, got /nowhere" in said[4]
    assert "must be named where no step was left out" in said[5]
    of_one = replayed(run_dir, 4)
    assert of_one["loss"] == of_two["loss"] == lines[4]["loss"]
    assert of_one["is_exact"] and "step-000003" in of_one["weights"]
    assert of_one["samples"] == of_two["samples"]
    later = replayed(cut, 5)  # of the checkpoint after it
    assert not later["is_exact"] and "step-000006" in later["weights"]
    assert {sample["key"] for sample in later["samples"]} == keys
    found = replayed(run_dir, 2)
    assert found["forward"] == {"0": "hf.model.language_model.layers.1.mlp.down_proj"}
    assert found["loss"] in ("nan", "inf") and found["verdict"].startswith("loss is")
    assert "nan" in {sample["loss"] for sample in found["samples"]}
    page = (run_dir / "replay/step-000002.html").read_text()
    assert 'class="fail"' in page and "layers.1.mlp.down_proj" in page


def poison(export: Path, path: Path) -> Path:
    """The same model, one of whose weights is infinite."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(export, path)
    weights = load_file(path / "model.safetensors")
    weights["model.language_model.layers.1.mlp.down_proj.weight"][3, 5] = torch.inf
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


class Roots(torch.nn.Module):
    """A root, whose gradient at 0 is infinite though its value is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


def test_a_gradient_that_ends_in_the_backward_is_named():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Sequential(Roots()), torch.nn.Linear(3, 1)
    )
    with torch.no_grad():
        model[0].bias.fill_(-100)  # so that ReLU gives zeros
    numbers = Numbers()
    with numbers.watched(model):
        model(torch.randn(2, 3)).sum().backward()
    assert (numbers.first_forward(), numbers.first_backward()) == (None, "2.0")
    assert not model[0]._forward_hooks
