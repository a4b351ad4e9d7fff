"""Alignment: the projector trains as in stock transformers, and the rest costs nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from safetensors.torch import load_file

from tests.models import tiny
from tests.models.stock import stock_loss, stock_twin
from tests.ranks import run_ranks
from tests.stages import one_step
from tests.stages.rows import build, documents
from tests.stages.test_sft import metrics, overrides
from tests.tiny import ROOT, make_model_dir, make_shards

STAGES = (0, 1, 2, 3)


def align_stage() -> ModuleType:
    sys.path.insert(0, str(ROOT / "stages"))
    import align

    return align


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_model_dir(tmp_path_factory.mktemp("align") / "model", tied=True)


def watched_steps(folder: Path, out: Path) -> list[tuple[one_step.Step, dict[str, Any]]]:
    """A step at each stage, with what of frozen parts there was to see."""
    import torch.distributed as dist

    from triptych_core.config import RunConfig
    from triptych_core.engine import build as engines
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    build_engine, seen = engines.build_engine, {}

    def watch(model: Any, optimizer: Any, *args: Any) -> Any:
        engine = build_engine(model, optimizer, *args)
        backward, step = engine.backward, engine.step

        def look_at_gradients(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
            seen["num_frozen"] = len(frozen)
            seen["frozen_with_gradient"] = [n for n, p in frozen if p.grad is not None]

        def look_at_states() -> None:
            step()
            moments = [s["exp_avg"] for s in optimizer.state.values() if "exp_avg" in s]
            seen["moments"] = torch.tensor(sum(m.numel() for m in moments))
            dist.all_reduce(seen["moments"])
            seen["groups"] = {group["name"] for group in optimizer.param_groups}

        engine.backward, engine.step = look_at_gradients, look_at_states
        tower = model.hf.model.visual.blocks[-1]
        tower.register_forward_hook(lambda *of: seen.update(tower_graph=of[-1].requires_grad))
        return engine

    engines.build_engine = watch
    steps = []
    for stage in STAGES:
        words = ["model.freeze=[vision,language]", "engine.precision=fp32"]
        words += [f"engine.zero.stage={stage}", "engine.checkpointing=full"]
        seen.clear()
        found = one_step.one_step(folder, runtime, out / str(stage), words)
        steps.append((found, dict(seen)))
    return steps


def test_the_projector_trains_as_in_stock_and_nothing_else_has_gradients(folder, tmp_path):
    model = build(folder)
    stock = stock_twin(model)
    chosen = [document for row in documents()[:2] for document in row]
    targets = sum(int((document.shift_labels != -100).sum()) for document in chosen)
    (stock_loss(stock, model, chosen) / targets).backward()
    wanted = {f"hf.{n}": p.grad for n, p in stock.named_parameters() if "merger" in n}
    size = sum(gradient.numel() for gradient in wanted.values())
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for rank in run_ranks(watched_steps, 2, folder, tmp_path):
        for stage, (step, seen) in zip(STAGES, rank, strict=True):
            assert step.gradients.keys() == wanted.keys()
            for name, gradient in step.gradients.items():
                error = (gradient.tensor - wanted[name]).norm() / wanted[name].norm()
                assert error < 1e-5, f"stage {stage}: {name} off by {error:.1e}"
            assert step.line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
            assert seen["num_frozen"] > 20
            assert seen["frozen_with_gradient"] == []
            assert not seen["tower_graph"]
            assert seen["groups"] == {"projector/decay", "projector/no_decay"}
            copies = 2 if stage == 0 else 1
            spare = 2 * 128 * (len(wanted) + 2)  # between weights, and up to equal shares
            assert copies * size <= seen["moments"] <= copies * size + spare


def ten_steps(folder: Path, out: Path) -> list[dict[str, Any]]:
    """At each stage: weights that are another after ten steps, and parameters with a state."""
    from triptych_core.config import RunConfig
    from triptych_core.engine import build as engines
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    build_engine, found = engines.build_engine, []

    def watch(model: Any, optimizer: Any, config: Any, *args: Any) -> Any:
        engine = build_engine(model, optimizer, config, *args)
        read, destroy = engines.read_parameters(config), engine.destroy

        def weights() -> dict[str, torch.Tensor]:
            with read(list(model.parameters())):
                return {n: p.detach().clone() for n, p in model.named_parameters()}

        before = weights()

        def look_and_destroy() -> None:
            after = weights()
            changed = {n for n, weight in before.items() if not torch.equal(weight, after[n])}
            states = {name for name, _ in optimizer_states(engine)}
            found.append({"changed": changed, "states": states, "all": set(before)})
            destroy()

        engine.destroy = look_and_destroy
        return engine

    engines.build_engine = watch
    for stage in STAGES:
        words = ["model.freeze=[vision,language]", "run.steps=10", "optim.ema_decay=0.9"]
        words += [f"engine.zero.stage={stage}", "engine.precision=bf16"]
        rows = [number % 8 for number in range(2 * 10)]
        one_step.steps(folder, runtime, out / str(stage), one_step.Run(words, rows))
    return found


def optimizer_states(engine: Any) -> list[tuple[str, Any]]:
    """(parameter, stretch) of all masters, moments and averages that a rank would save."""
    from triptych_core.checkpoint.fragments import fragments

    return [(f.name, stretch) for f in fragments(engine) for stretch in f.stretches()]


def test_frozen_parts_are_bit_equal_after_ten_steps_and_have_no_states(folder, tmp_path):
    for rank in run_ranks(ten_steps, 2, folder, tmp_path):
        for found in rank:
            trained = {name for name in found["all"] if "merger" in name}
            assert len(found["all"]) > 20 + len(trained)
            assert found["changed"] == trained and found["states"] <= trained
        states = [found["states"] for found in rank]
        assert states[0] == {name for name in rank[0]["all"] if "merger" in name}


def test_a_first_layer_trains_behind_frozen_embeddings(tmp_path):
    """DeepSpeed's ZeRO-3 needs a gradient of its input to know when its weights' are there."""
    folder = tiny.write_moe_model_dir(tmp_path / "model", tied=True)
    words = ["model.freeze=[language]", "engine.precision=fp32"]
    runs = [[*words, f"engine.zero.stage={stage}"] for stage in (0, 3)]
    ((wanted, found),) = run_ranks(one_step.on_a_rank, 1, folder, tmp_path / "out", runs)
    one_step.compare(found, wanted, "stage 3")


def align(words: list[str]) -> None:
    from triptych_core.config import load_config

    stage = align_stage()
    stage.main(load_config(stage.AlignConfig, None, words))


def go_on(words: list[str]) -> None:
    from tests.stages.test_sft import run_stage

    run_stage(words)


def test_fine_tuning_goes_on_from_the_export(tmp_path):

    make_model_dir(tmp_path / "model")
    make_shards(tmp_path / "train", 30, seed=1)
    make_shards(tmp_path / "heldout", 3, seed=2)
    run = tmp_path / "aligned"
    words = [*overrides(tmp_path, run, "run.steps=3"), "evaluation.shards=[]"]
    run_ranks(align, 2, [*words, "engine.zero.stage=3"])
    whole = load_file(run / "export/model.safetensors")
    model = build_from(tmp_path / "model")
    for name, value in model.items():
        if "merger" in name:
            assert not torch.equal(whole[name], value), name
        else:
            assert torch.equal(whole[name], value), name
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    start = [f"model.path={run / 'export'}", "model.init=pretrained", "run.steps=1"]
    more = [*overrides(tmp_path, tmp_path / "tuned", *start), "engine.zero.stage=1"]
    run_ranks(go_on, 1, [*more, "evaluation.shards=[]"])
    assert metrics(tmp_path / "tuned")[0]["loss"] < lines[0]["loss"]


def build_from(folder: Path) -> dict[str, torch.Tensor]:
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model

    config = ModelConfig(path=folder, init="random", seed=0)
    hf = build_model(config, dtype=torch.float32).hf
    return {name: value.detach() for name, value in hf.named_parameters()}


def test_what_is_no_alignment_is_refused(tmp_path):
    make_model_dir(tmp_path / "model")
    words = overrides(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match=r"model\.freeze: must be \[vision, language\]"):
        align([*words, "model.freeze=[vision]"])
    with pytest.raises(ValueError, match=r"model\.lora: must be left out in this stage"):
        align([*words, "model.lora.rank=4"])
    text = tiny.write_text_model_dir(tmp_path / "text")
    with pytest.raises(ValueError, match=r"model\.path: must hold a model with a projector"):
        align([*words, f"model.path={text}"])


def test_the_shipped_configuration_has_the_rate_of_a_fresh_projector():
    from triptych_core.config import load_config

    config = load_config(align_stage().AlignConfig, ROOT / "stages/configs/align_tiny.yaml")
    assert config.model.freeze == ["vision", "language"]
    assert (config.optim.lr, config.optim.weight_decay) == (1e-3, 0.0)
