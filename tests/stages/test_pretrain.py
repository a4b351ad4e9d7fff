"""The pretraining stage on documents, against a plain loop of stock transformers and as a whole."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.ranks import run_ranks
from tests.stages import test_samples as parity
from tests.tiny import ROOT, make_model_dir, make_shards
from triptych_data.plan.ledger import audit, read_ledger

SHIPPED = ROOT / "stages/configs/qwen3_tiny"
SEQ_LEN = 64


def make_text_model_dir(path: Path) -> Path:
    """The shipped tiny Qwen3 with its widths cut down until a step takes milliseconds."""
    shutil.copytree(SHIPPED, path)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_documents(path: Path, count: int) -> Path:
    """Shards of documents of 5 to 130 tokens."""
    from triptych_data.shards.write import write_shards

    generator = np.random.default_rng(count)
    words = ("a", "small", "boat", "saw", "the", "sea", "digit", "is", "one", "two.\n")
    lines = [
        json.dumps({"text": " ".join(generator.choice(words, size=2 + 7 * (i % 8)))})
        for i in range(count)
    ]
    path.mkdir(parents=True)
    (path / "documents.jsonl").write_text("\n".join(lines) + "\n")
    write_shards(path / "documents.jsonl", path / "shards", samples_per_shard=9)
    return path / "shards"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrain")
    make_text_model_dir(path / "model")
    make_documents(path / "data", 40)
    make_documents(path / "heldout", 11)
    return path


def pretrain_stage() -> ModuleType:
    sys.path.insert(0, str(ROOT / "stages"))
    import pretrain

    return pretrain


def overrides(workspace: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"run.dir={run_dir}",
        "run.steps=4",
        "run.device=cpu",
        f"model.path={workspace / 'model'}",
        "model.init=random",
        f"data.shards=[{workspace / 'data/shards'}]",
        f"data.seq_len={SEQ_LEN}",
        "data.num_workers=0",
        "data.balance_group=1",  # packs of cut and of short documents one after the other
        "engine.precision=fp32",
        "engine.zero.bucket_size=5000",
        "engine.zero.persistence_threshold=0",
        "optim.lr=1e-2",
        "schedule.warmup_steps=2",
        "schedule.decay_steps=1",
        "checkpoint.every=2",
        f"evaluation.shards=[{workspace / 'heldout/shards'}]",
        *more,
    ]


def run_stage(words: list[str]) -> None:
    from triptych_core.config import load_config

    stage = pretrain_stage()
    stage.main(load_config(stage.PretrainConfig, None, words))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def stock_start(workspace: Path) -> Any:
    """A stock Qwen3 in fp64 with the weights that the stage draws from seed 0."""
    from transformers import Qwen3ForCausalLM

    from triptych_models.config import ModelConfig
    from triptych_models.export import export
    from triptych_models.families import build_model

    config = ModelConfig(path=workspace / "model", init="random", seed=0)
    start = workspace / "start"
    if not start.exists():
        ours = build_model(config, dtype=torch.float32)
        export(ours.hf, start, workspace / "model", dtype=torch.float32)
    return Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float64, attn_implementation="sdpa")


def document_tokens(workspace: Path) -> list[list[int]]:
    """Every document by the stock tokenizer, with the end of a document behind it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    lines = (workspace / "data/documents.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [[*document, tokenizer.eos_token_id] for document in ids]


def summed_loss(stock: Any, tokens: list[int], begin: int = 0, length: int = 10**9) -> torch.Tensor:
    """Of `length` tokens of a document from `begin` on, each the target of the one before it."""
    ids = torch.tensor(tokens[begin : begin + length])
    labels = torch.tensor([*tokens[begin + 1 : begin + length + 1], -100])[: len(ids)]
    logits = stock(ids[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def plain_loop(
    workspace: Path, run_dir: Path, lines: list[dict[str, Any]]
) -> tuple[Any, list[float], list[float]]:
    """The same documents, cut alike, through stock transformers and torch's AdamW, unpacked."""
    from triptych_data.config import DataConfig
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor

    stock, documents = stock_start(workspace), document_tokens(workspace)
    # What the run's packs were balanced by is settled from its model.
    data = DataConfig.model_validate(yaml.safe_load((run_dir / "config.yaml").read_text())["data"])
    processor = Processor.from_directory(workspace / "model")
    loader = PackLoader(data, processor, rank=0, world_size=1)
    stream = iter(loader)
    decayed = [p for p in stock.parameters() if p.ndim > 1]
    others = [p for p in stock.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    losses, norms, ends, cuts = [], [], 0, 0
    for line in lines:
        packs = [next(stream)["sample_ids"] for _ in range(2)]
        places = [loader.plan.pieces.locate(piece) for pack in packs for piece in pack]
        pieces = [(documents[sample], number * SEQ_LEN, SEQ_LEN) for sample, number in places]
        loss = sum(summed_loss(stock, *piece) for piece in pieces)
        targets = sum(min(SEQ_LEN, len(tokens) - 1 - begin) for tokens, begin, _ in pieces)
        assert targets == line["num_targets"]
        ends += sum(len(tokens) <= begin + length for tokens, begin, length in pieces)
        cuts += sum(begin > 0 for _, begin, _ in pieces)
        optimizer.zero_grad()
        (loss / targets).backward()
        losses.append(loss.item() / targets)
        norms.append(torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
    assert ends > 4 and cuts > 4, "the packs must show both"
    return stock, losses, norms


@pytest.fixture(scope="module")
def finished(workspace) -> Path:
    """Four steps on two ranks under ZeRO-1."""
    run_ranks(run_stage, 2, overrides(workspace, workspace / "one", "engine.zero.stage=1"))
    return workspace / "one"


def check_against_plain_loop(workspace: Path, run_dir: Path) -> None:
    from safetensors.torch import load_file

    lines = metrics(run_dir)
    stock, losses, norms = plain_loop(workspace, run_dir, lines)
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    start = load_file(workspace / "start/model.safetensors")
    trained = load_file(run_dir / "export/model.safetensors")
    for name, ours in trained.items():
        wanted = stock.get_parameter(name)
        moved = (wanted - start[name].double()).norm()
        assert (ours.double() - wanted).norm() <= 1e-3 * moved, name
    held = [json.loads(line) for line in (run_dir / "evaluation.jsonl").open()]
    assert [line["step"] for line in held] == [0, 4] and held[0]["counts"] == {}
    assert held[1]["heldout_loss"] < held[0]["heldout_loss"]


def test_training_equals_a_plain_loop_of_stock_transformers(workspace, finished):
    check_against_plain_loop(workspace, finished)
    assert [line["lr"] for line in metrics(finished)] == pytest.approx([5e-3, 1e-2, 1e-2, 0.0])


def test_so_it_does_under_zero_3(workspace):
    run_ranks(run_stage, 2, overrides(workspace, workspace / "three", "engine.zero.stage=3"))
    check_against_plain_loop(workspace, workspace / "three")


def test_gradients_equal_stock_document_by_document(workspace):
    stock, documents = stock_start(workspace), document_tokens(workspace)
    chosen = [documents[i] for pack in parity.PACKS[:4] for i in pack]
    loss = sum(summed_loss(stock, tokens) for tokens in chosen)
    targets = sum(len(tokens) - 1 for tokens in chosen)
    (loss / targets).backward()
    wanted = {name: p.grad for name, p in stock.named_parameters()}
    reference = {4: (loss.item() / targets, wanted)}
    of_ranks = run_ranks(gradients, 2, workspace)
    for number, stage in enumerate((1, 3)):
        parity.check([found[number] for found in of_ranks], reference, stage)


def gradients(workspace: Path) -> list[dict[int, Any]]:
    """By stage, then by accumulation."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    return [{2: parity.gradients_of_a_step(workspace, s, 2, seed=0)} for s in (1, 3)]


def test_resumed_steps_are_bit_equal(workspace, finished):
    resumed = workspace / "resumed"
    shutil.copytree(finished, resumed)
    shutil.rmtree(resumed / "checkpoints/step-000004")
    shutil.rmtree(resumed / "export")
    run_ranks(run_stage, 2, overrides(workspace, resumed, "engine.zero.stage=1"))
    exact = ("step", "loss", "grad_norm", "num_targets", "num_tokens", "lr", "flops")
    for before, after in zip(metrics(finished), metrics(resumed), strict=True):
        assert [before[key] for key in exact] == [after[key] for key in exact]


def test_a_stable_run_is_gone_on_from_and_then_decays(workspace, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = finished / "export"
    AutoModelForCausalLM.from_pretrained(export)
    assert AutoTokenizer.from_pretrained(export).eos_token == "<|endoftext|>"
    run_dir = workspace / "continued"
    continued = (f"model.path={export}", "model.init=pretrained", "evaluation.shards=[]")
    for steps, decay_steps in ((2, 0), (4, 1)):
        more = (f"run.steps={steps}", f"schedule.decay_steps={decay_steps}", "engine.zero.stage=0")
        run_ranks(run_stage, 1, overrides(workspace, run_dir, *continued, *more))
    lines = metrics(run_dir)
    assert [line["lr"] for line in lines] == pytest.approx([5e-3, 1e-2, 1e-2, 0.0])
    assert lines[0]["loss"] < metrics(finished)[-1]["loss"] + 0.2  # it began where that one ended


def test_documents_and_chats_with_images_are_mixed(workspace):
    make_model_dir(workspace / "vl")
    chats = make_shards(workspace / "chats", 14)
    words = overrides(
        workspace,
        workspace / "mixed",
        "run.steps=3",
        f"model.path={workspace / 'vl'}",
        "data.shards=null",
        f"data.sources.text.shards=[{workspace / 'data/shards'}]",
        "data.sources.text.weight=2",
        f"data.sources.chats.shards=[{chats}]",
        "data.sources.chats.weight=1",
        "data.seq_len=512",
        "data.ledger=true",
        "engine.zero.stage=3",
        "evaluation.shards=[]",
        "checkpoint.save=false",
        "export=false",
    )
    run_ranks(run_stage, 2, words)
    found = audit(workspace / "mixed/ledger", once_per_epoch=False)
    assert found.problems == []
    packs = [
        pack
        for rank in (0, 1)
        for line in read_ledger(workspace / f"mixed/ledger/rank-0000{rank}.jsonl")
        for pack in line["packs"]
    ]
    ids = [sample for pack in packs for sample in pack["ids"]]
    texts = sum(sample < 40 for sample in ids)  # none is longer than a pack here
    assert 0 < texts < len(ids)
    lines = metrics(workspace / "mixed")
    assert all(0 < line["loss"] < 10 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_misspelt_key_is_named():
    from triptych_core.config import load_config

    stage = pretrain_stage()
    with pytest.raises(ValueError, match=r"schedule.kidn: must be a key .* did you mean 'kind'"):
        load_config(stage.PretrainConfig, None, ["schedule.kidn=wsd"])
    for path in (ROOT / "stages/configs").glob("pretrain_*.yaml"):
        config = load_config(stage.PretrainConfig, path)
        assert (config.schedule.kind, config.optim.weight_decay) == ("wsd", 0.1)


def test_parts_that_a_language_model_lacks_are_refused(workspace):
    stage = pretrain_stage()
    for word, message in (
        ("model.freeze=[vision]", r"model.freeze: must name parts of the model \(language\)"),
        ("optim.lr_by_part.vision=1e-5", r"optim.lr_by_part: must name parts of the model"),
        ("model.freeze=[language]", r"model.freeze: must leave a part to train"),
        ("model.family=qwen3_vl", r"model_type must be qwen3_vl, got qwen3"),
    ):
        words = overrides(workspace, workspace / "refused", word, "plan.show=table")
        from triptych_core.config import load_config

        with pytest.raises(ValueError, match=message):
            stage.main(load_config(stage.PretrainConfig, None, words))


def test_the_plan_is_of_text_alone(workspace):
    words = overrides(workspace, workspace / "planned", "engine.zero.stage=auto")
    # Not here: after a backward on fake tensors one cannot fork.
    [(parameters, stage)] = run_ranks(planned, 1, words)
    assert parameters == sum(p.numel() for p in stock_start(workspace).parameters())
    assert stage == 0


def planned(words: list[str]) -> tuple[int, int]:
    from triptych_core.config import load_config

    stage = pretrain_stage()
    made = stage.plan(load_config(stage.PretrainConfig, None, words))
    assert made.chosen is not None
    return made.parameters, made.chosen.stage


def test_the_loss_of_real_text_falls_on_the_tiny_config(tmp_path):
    from triptych_core.config import load_config
    from triptych_data.shards.write import write_shards

    # A text that does not change with the project: what the first row holds moves the first loss.
    line = json.dumps({"text": (ROOT / "LICENSE").read_text()})
    (tmp_path / "licence.jsonl").write_text(line + "\n")
    write_shards(tmp_path / "licence.jsonl", tmp_path / "shards")
    words = [
        f"run.dir={tmp_path / 'run'}",
        "run.device=cpu",
        "run.steps=30",
        f"model.path={SHIPPED}",
        f"data.shards=[{tmp_path / 'shards'}]",
        "data.seq_len=256",
        "data.num_workers=0",
        "schedule.warmup_steps=5",
        "schedule.decay_steps=10",
        "checkpoint.save=false",
        "export=false",
    ]
    stage = pretrain_stage()
    config = load_config(stage.PretrainConfig, ROOT / "stages/configs/pretrain_tiny.yaml", words)
    run_ranks(stage.main, 1, config)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[0] == pytest.approx(np.log(512), abs=0.15)  # random weights know nothing
    assert np.mean(losses[-5:]) < 4.7
