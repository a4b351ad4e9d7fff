"""What may be another in a run that goes on, what is refused by name, and what is put on record.

One job of two ranks saves a step, then tries to go on from it in one changed way after the other.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import triptych_core.engine.build  # noqa: F401, before ranks are forked: it takes seconds
from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards, sft_stage

# What is changed: words, and the field that is named. Of data:
OTHER_DATA = {
    "samples": (["data.shards=[{place}/other/shards]"], "data of source shards must be"),
    "rows": (["data.seq_len=320"], "data.seq_len must be 256 as when it was saved, got 320"),
    "order": (["data.seed=9"], "data.seed must be 0 as when it was saved, got 9"),
    "tokenizer": (["model.path={place}/tokenizer"], "processor.tokenizer must be"),
    "template": (["model.path={place}/template"], "processor.chat must be"),
    "pixels": (["data.max_pixels=4096"], "processor.image must be {"),
}
# Of the rest; the last one leaves DeepSpeed's groups behind, with which no other engine is built.
REFUSED = {
    "model": (["model.path={place}/eps"], "model.text_config.rms_norm_eps must be 0.001"),
    "shapes": (
        ["model.path={place}/wide"],
        "model.language_model.layers.0.mlp.gate_proj.weight must be (80, 48) as in this run, got "
        "(64, 48)",
    ),
    "frozen": (["model.freeze=[vision]"], "trainable_parameters.hf.model.visual."),
    "adapters": (["model.lora.rank=2"], "trainable_parameters.hf."),
    "optimizer": (["optim.name=muon"], "optimizer must be muon as in this run, got adamw"),
    "parallel": (["parallel.tensor=2"], "parallel.tensor must be 2 as in this run, got 1"),
}
GOES_ON = {
    "model": ["model.path={place}/eps", "checkpoint.resume_anyway=true"],
    "rows": ["data.seq_len=320", "data.resume_anyway=true"],
    "bf16": ["engine.precision=bf16", "optim.state_dtype=bf16", "engine.zero.stage=3"],
    "average": ["optim.ema_decay=0.5"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("changes")
    make_model_dir(path / "first model")
    changed(path, "model", "config.json", lambda c: c["text_config"].update(num_key_value_heads=2))
    make_shards(path / "train", 24, seed=1)
    make_shards(path / "other", 24, seed=2)
    changed(path, "eps", "config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-3))
    changed(path, "wide", "config.json", lambda c: c["text_config"].update(intermediate_size=80))
    changed(path, "tokenizer", "tokenizer.json", swap_two_ids)
    shutil.copytree(path / "model", path / "template")
    with (path / "template/chat_template.jinja").open("a") as file:
        file.write("{# another #}")
    return path


def changed(path: Path, name: str, file: str, change: Callable[[Any], None]) -> None:
    """A copy of the model's folder with another JSON file."""
    shutil.copytree(path / ("first model" if name == "model" else "model"), path / name)
    tree = json.loads((path / name / file).read_text())
    change(tree)
    (path / name / file).write_text(json.dumps(tree))


def swap_two_ids(tokenizer: Any) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.fixture(scope="module")
def told(place) -> dict[str, Any]:
    """By the name of what was tried: what was said of it, or what is on record."""
    return run_ranks(tried, 2, place, timeout=500)[0]


def tried(place: Path) -> dict[str, Any]:
    sys.path.insert(0, str(Path(sft_stage().__file__).parent))
    import wiring

    from triptych_core.checkpoint.saver import resume
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    go_on(place, "first", ["run.steps=1"])
    found: dict[str, Any] = {}
    for name, words in GOES_ON.items():
        found[name] = go_on(place, f"goes on {name}", [*words, "run.steps=2"])
    found["no average"] = go_on(place, "no average", ["run.steps=3"], start="goes on average")
    for name, (words, _) in REFUSED.items():
        job = wiring.build_job(configure(place / "first", place, [*words, "run.steps=2"]), runtime)
        try:
            resume(job.engine, job.config, job.batches)
        except ValueError as error:
            found[f"refused {name}"] = str(error)
    return found


def configure(run_dir: Path, place: Path, words: list[str]) -> Any:
    from triptych_core.config import load_config

    base = [
        *(f"run.dir={run_dir}", "run.device=cpu", f"model.path={place / 'model'}"),
        *("model.init=random", "model.compile=none", "engine.precision=fp32"),
        *(f"data.shards=[{place / 'train/shards'}]", "data.seq_len=256", "data.num_workers=0"),
        *("engine.zero.stage=1", "optim.lr=1e-2", "schedule.kind=constant"),
        *("checkpoint.every=1", "checkpoint.keep=9"),
    ]
    words = [*base, *(word.replace("{place}", str(place)) for word in words)]
    return load_config(sft_stage().SftConfig, None, words)


def go_on(place: Path, name: str, words: list[str], start: str = "first") -> dict[str, Any]:
    """To the end, from a copy of what was saved; what is on record of that, and of its states."""
    import torch.distributed as dist
    import wiring
    from verifying import take_steps

    from triptych_core.checkpoint.saver import resume
    from triptych_core.launch import Runtime
    from triptych_core.run import open_run

    runtime, run_dir = Runtime(dist.get_rank(), dist.get_world_size()), place / name
    if runtime.is_main and name != "first":
        shutil.copytree(place / start, run_dir)
    dist.barrier()
    job = wiring.build_job(configure(run_dir, place, words), runtime)
    open_run(job.config, runtime, {}, resume(job.engine, job.config, job.batches))
    take_steps(job, runtime)
    record = json.loads((run_dir / "run.json").read_text()).get("resumes", [{}])[-1]
    return {**record, "states": read_states(run_dir)}


def read_states(run_dir: Path) -> dict[str, Any]:
    """Of a weight in the newest checkpoint: its master and states, on one line each."""
    import torch

    from triptych_core.checkpoint.folders import checkpoints
    from triptych_core.checkpoint.payload import Payloads, Stretch

    payloads = Payloads(checkpoints(run_dir)[-1].glob("rank-*.safetensors"))
    name = "hf.model.language_model.layers.0.mlp.gate_proj.weight"
    found = {}
    for kind, dtype in payloads.kinds(name).items():
        found[kind] = torch.zeros(64 * 48, dtype=dtype)
        payloads.fill(Stretch(name, kind, 0, found[kind]))
    return found


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_are_refused_by_name(told, place, name):
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor

    words, field = OTHER_DATA[name]
    config = configure(place / "first", place, words)
    processor = Processor.from_directory(config.model.path, max_pixels=config.data.max_pixels)
    loader = PackLoader(config.data, processor, rank=0, world_size=1)
    saved = json.loads((place / "first/checkpoints/step-000001/state.json").read_text())["data"]
    with pytest.raises(ValueError, match=f"data state: .*{re.escape(field)}"):
        loader.load_state_dict(saved)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(told, name):
    assert REFUSED[name][1] in told[f"refused {name}"]


def test_going_on_anyway_is_on_record(told):
    assert told["model"]["step"] == 1
    assert told["model"]["resumed_anyway"] == ["model.text_config.rms_norm_eps"]
    assert told["rows"]["resumed_anyway"] == []
    (record,) = told["rows"]["data"]
    assert record["changed"] == {"data.seq_len": {"was": 256, "is": 320}}
    assert "data" not in told["model"]


def test_precision_and_states_may_change_and_that_is_on_record(told):
    import torch

    record = told["bf16"]
    assert record["changed"]["engine.precision"] == ["fp32", "bf16"]
    assert record["changed"]["optim.state_dtype"] == ["fp32", "bf16"]
    assert record["changed"]["engine.zero.stage"] == [1, 3]
    assert record["states"]["master"].dtype == torch.float32
    assert record["states"]["exp_avg_sq"].dtype == torch.bfloat16


def test_an_average_begins_with_the_masters_and_goes(told, place):
    import torch

    before, after = read_states(place / "first"), told["average"]["states"]
    assert "average" not in before
    assert not torch.equal(before["master"], after["master"])
    wanted = torch.lerp(before["master"], after["master"], 0.5)
    assert torch.allclose(after["average"], wanted, rtol=0, atol=1e-8)
    assert "average" not in told["no average"]["states"]
    assert told["no average"]["changed"]["optim.ema_decay"] == [0.5, None]
