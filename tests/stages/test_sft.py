"""The SFT stage as a user runs it: a whole run, a resume, an export, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.ranks import run_ranks, run_script
from tests.tiny import ROOT, make_model_dir, make_shards, sft_stage
from triptych_data.plan.ledger import audit

CONFIGS = sorted((ROOT / "stages/configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sft")
    make_model_dir(path / "model")
    make_shards(path / "train", 40, seed=1)
    make_shards(path / "heldout", 6, seed=2)
    return path


def overrides(workspace: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"run.dir={run_dir}",
        "run.steps=6",
        "run.device=cpu",
        f"model.path={workspace / 'model'}",
        "model.init=random",
        f"data.shards=[{workspace / 'train/shards'}]",
        "data.seq_len=256",
        "data.num_workers=0",
        "engine.precision=fp32",
        "optim.lr=1e-2",
        "checkpoint.every=3",
        "data.ledger=true",
        f"evaluation.shards=[{workspace / 'heldout/shards'}]",
        "evaluation.max_new_tokens=3",
        "evaluation.batch_size=2",
        *more,
    ]


def run_stage(words: list[str]) -> None:
    """`stages/sft.py` in this process, as its `__main__` does it."""
    from triptych_core.config import load_config

    sft = sft_stage()
    sft.main(load_config(sft.SftConfig, None, words))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def finished(workspace) -> Path:
    """A run of six steps on two ranks under ZeRO-3, with accumulation."""
    run_dir = workspace / "runs/whole"
    words = overrides(workspace, run_dir, "engine.gradient_accumulation_steps=2")
    run_ranks(run_stage, 2, words)
    return run_dir


def test_a_run_leaves_what_the_readme_says(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["num_targets"] > 0 and 0 < line["packing_fill"] <= 1 for line in lines)
    assert all(line["grad_norm"] > 0 and line["flops"] > 0 for line in lines)
    evaluations = [json.loads(line) for line in (finished / "evaluation.jsonl").open()]
    assert [e["step"] for e in evaluations] == [0, 6]
    assert evaluations[1]["heldout_loss"] < evaluations[0]["heldout_loss"]
    assert set(evaluations[1]["exact_match"]) == {"kind 0", "kind 1"}
    assert lines[-1]["eval/loss"] == evaluations[1]["heldout_loss"]
    assert lines[-1]["eval/score"] == evaluations[1]["score"]
    assert not any("eval/loss" in line for line in lines[:-1])
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == [
        "step-000003",
        "step-000006",
    ]
    assert "held-out" in (finished / "report.html").read_text().lower()
    assert yaml.safe_load((finished / "config.yaml").read_text())["run"]["steps"] == 6
    assert json.loads((finished / "run.json").read_text())["finished"]


def test_resumed_steps_are_bit_equal(workspace, finished):
    resumed = workspace / "runs/resumed"
    shutil.copytree(finished, resumed)
    shutil.rmtree(resumed / "checkpoints/step-000006")
    shutil.rmtree(resumed / "export")
    words = overrides(workspace, resumed, "engine.gradient_accumulation_steps=2")
    run_ranks(run_stage, 2, words)
    exact = ("step", "loss", "grad_norm", "num_targets", "num_tokens", "lr", "flops")
    for before, after in zip(metrics(finished), metrics(resumed), strict=True):
        assert [before[key] for key in exact] == [after[key] for key in exact]
    # The data went on where it stopped: nothing lost, nothing repeated.
    states = [
        json.loads((run / "checkpoints/step-000006/state.json").read_text())["data"]
        for run in (finished, resumed)
    ]
    assert states[0] == states[1]
    for run in (finished, resumed):
        found = audit(run / "ledger")
        assert (found.problems, found.steps) == ([], 6)
        assert states[0]["position"] == found.samples == 120


def test_a_run_goes_on_with_other_ranks_and_another_stage(workspace, finished, capfd):
    moved = workspace / "runs/moved"
    shutil.copytree(finished, moved)
    shutil.rmtree(moved / "checkpoints/step-000006")
    more = ["engine.gradient_accumulation_steps=4", "engine.zero.stage=1", "export=false"]
    run_ranks(run_stage, 1, overrides(workspace, moved, *more))
    assert "was saved by 2 ranks, 1 go on; random generators are seeded" in capfd.readouterr().out
    for before, after in zip(metrics(finished), metrics(moved), strict=True):
        for key in ("loss", "grad_norm"):
            assert after[key] == pytest.approx(before[key], rel=1e-4)
        assert before["num_targets"] == after["num_targets"]
    found = audit(moved / "ledger")
    assert (found.problems, found.steps, found.samples) == ([], 6, 120)


def test_resuming_on_other_data_or_another_model_is_refused_by_name(workspace, finished):
    other, model = workspace / "runs/other", workspace / "other-model"
    shutil.copytree(finished, other)
    words = overrides(workspace, other, "engine.gradient_accumulation_steps=2")
    with pytest.raises(RuntimeError, match=r"checkpoint data state: data\.seq_len must be 256"):
        run_ranks(run_stage, 2, [*words, "data.seq_len=320"])
    shutil.copytree(workspace / "model", model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"model\.text_config\.rms_norm_eps must be 0\.001"):
        run_ranks(run_stage, 2, [*words, f"model.path={model}"])


def test_a_resume_takes_its_own_optimizer_settings_and_never_a_stale_state(workspace, finished):
    run_dir = workspace / "runs/changed"
    shutil.copytree(finished, run_dir)
    words = overrides(workspace, run_dir, "engine.gradient_accumulation_steps=2")
    with pytest.raises(RuntimeError, match="must be auto where a run has checkpoints"):
        run_ranks(run_stage, 2, [*words, "checkpoint.resume=never"])
    with pytest.raises(RuntimeError, match="must be at least the 6 steps"):
        run_ranks(run_stage, 2, [*words, "run.steps=5"])
    with pytest.raises(RuntimeError, match=r"trainable_parameters\.\S+ must be absent"):
        run_ranks(run_stage, 2, [*words, "model.freeze=[vision]"])
    # None of the refused attempts touched the run's own record.
    assert json.loads((run_dir / "run.json").read_text())["finished"]
    changed = [
        *words,
        "run.steps=7",
        "optim.lr=1e-12",
        "optim.weight_decay=0",
        "schedule.kind=constant",
    ]
    run_ranks(weights_do_not_move, 2, changed, finished)


def weights_do_not_move(words: list[str], finished: Path) -> None:
    """Continue for one step at a rate of 1e-12: the export equals the old one."""
    from safetensors.torch import load_file

    run_stage(words)
    config = dict(word.split("=", 1) for word in words)
    before = load_file(finished / "export/model.safetensors")
    after = load_file(Path(config["run.dir"]) / "export/model.safetensors")
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], atol=1e-9, rtol=1e-6), name


def test_the_export_answers_like_the_trained_model(workspace, finished):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from triptych_data.heldout import Heldout
    from triptych_data.processor import Processor

    stock = AutoModelForImageTextToText.from_pretrained(finished / "export").eval()
    AutoProcessor.from_pretrained(finished / "export")
    processor = Processor.from_directory(finished / "export")
    shards = workspace / "heldout/shards"
    heldout = Heldout([shards], processor, seq_len=256, rank=0, world_size=1, limit=100)
    last = [json.loads(line) for line in (finished / "evaluation.jsonl").open()][-1]
    given = {example["key"]: example["answer"] for example in last["examples"]}
    assert len(given) == len(heldout.questions)
    for question in heldout.questions:
        prompt = heldout.prompt(question.index)
        inputs: dict[str, Any] = {"input_ids": prompt.input_ids[None]}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
        if prompt.pixel_values is not None:
            inputs["pixel_values"] = prompt.pixel_values.float() / 127.5 - 1
            inputs["image_grid_thw"] = prompt.image_grid_thw
        with torch.no_grad():
            tokens = stock.generate(**inputs, max_new_tokens=3, do_sample=False)[0]
        new = tokens[prompt.input_ids.numel() :].tolist()
        if processor.eos_token_id in new:
            new = new[: new.index(processor.eos_token_id)]
        assert processor.decode(new) == given[heldout.describe(question.index)["key"]]


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of every key, sections included."""
    found = []
    for key, value in tree.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
    return found


def misspelt(key: str) -> str:
    """The key with two neighbouring letters swapped, or one doubled where they are equal."""
    swapped = key[:-2] + key[-1] + key[-2]
    return swapped if swapped != key else key + key[-1]


def misspelt_trees(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Of each key of a configuration: its misspelt dotted path, the key, and the tree with it."""
    cases = []
    for dotted in leaves(yaml.safe_load(path.read_text())):
        *parents, key = dotted.split(".")
        wrong = yaml.safe_load(path.read_text())
        node = wrong
        for parent in parents:
            node = node[parent]
        node[misspelt(key)] = node.pop(key)
        cases.append((".".join([*parents, misspelt(key)]), key, wrong))
    return cases


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, dict[str, str]]:
    """By configuration, what each misspelt key's refusal said; of one process for each stage."""
    folder, said = tmp_path_factory.mktemp("misspelt"), {}
    others = {"diffusion": "DiffusionConfig", "rae": "RaeConfig"}
    # The keys of sft are those of all stages of packed rows.
    of_stage: dict[str, list[Path]] = {"sft": [], **{stage: [] for stage in others}}
    for path in CONFIGS:
        stage = path.stem.split("_")[0]
        of_stage[stage if stage in others else "sft"].append(path)
    for stage, paths in of_stage.items():
        cases = {path.stem: misspelt_trees(path) for path in paths}
        (folder / "cases.json").write_text(json.dumps(cases))
        words = [str(ROOT / "stages"), stage, others.get(stage, "SftConfig"), str(folder)]
        command = [sys.executable, "-c", CHECK, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        said |= json.loads(done.stdout)
    return said


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_misspelt_key_is_refused_with_the_nearest_one_before_torch(path, refusals):
    cases = misspelt_trees(path)
    assert len(cases) >= 20
    for wrong, key, _ in cases:
        text = refusals[path.stem][wrong]
        assert f"{wrong}:" in text and f"did you mean '{key}'" in text, (wrong, text)


CHECK = """
import importlib, json, pathlib, sys, yaml
stages, stage, config, folder = sys.argv[1:]
sys.path.insert(0, stages)
Config = getattr(importlib.import_module(stage), config)
from triptych_core.config import load_config
path, said = pathlib.Path(folder) / "config.yaml", {}
for name, cases in json.loads((path.parent / "cases.json").read_text()).items():
    said[name] = {}
    for wrong, _, tree in cases:
        path.write_text(yaml.safe_dump(tree))
        try:
            load_config(Config, path)
            said[name][wrong] = "it was accepted"
        except ValueError as error:
            said[name][wrong] = str(error)
assert "torch" not in sys.modules, "torch was imported to check a configuration"
print(json.dumps(said))
"""


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    """`deepspeed stages/sft.py` in a shell of its own."""
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [str(binaries / "deepspeed"), "--num_gpus=2", "--master_port=29731", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
        timeout=300,
    )


def test_the_launcher_trains_two_ranks(workspace):
    run_dir = workspace / "runs/launched"
    words = overrides(workspace, run_dir, "run.steps=2", "evaluation.shards=[]", "export=false")
    result = launched("stages/sft.py", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]
    assert "step 2/2  loss" in result.stdout


def test_a_typo_ends_a_launched_run_with_one_line():
    result = launched("stages/sft.py", "optim.ler=1")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: optim.ler: must be a key of optim, got 'ler'; did you mean 'lr'?"]


def test_a_users_mistake_during_the_run_is_one_line(workspace):
    missing = workspace / "nowhere"
    words = overrides(workspace, workspace / "runs/mistake", f"data.shards=[{missing}]")
    result = run_script(ROOT / "stages/sft.py", *words)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert str(missing) in line
