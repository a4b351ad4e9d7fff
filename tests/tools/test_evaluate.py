"""evaluate.py: loss and answers are stock's, ranks agree, costs are what was computed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.ranks import run_ranks
from tests.tiny import ROOT, make_chats, make_model_dir

sys.path.insert(0, str(ROOT / "tools"))
from evaluate import evaluate, table
from evaluate_split import Settings

LENGTH = 5  # of answers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that answers differ."""
    from triptych_models.config import ModelConfig
    from triptych_models.export import export
    from triptych_models.families import build_model

    path = tmp_path_factory.mktemp("evaluate")
    small = make_model_dir(path / "small")
    config = json.loads((small / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["initializer_range"] = 0.2
    (small / "config.json").write_text(json.dumps(config))
    built = build_model(ModelConfig(path=small, init="random"), dtype=torch.float32)
    export(built.hf, path / "model", small, dtype=torch.float32)
    return path / "model"


def write(path: Path, count: int, fields: list[dict[str, Any]], seed: int = 0) -> Path:
    """Shards of chats with more fields, taken in turn."""
    from triptych_data.shards.write import write_shards

    chats = make_chats(path / "raw", count, seed)
    lines = [json.loads(line) for line in chats.read_text().splitlines()]
    mixed = [line | fields[i % len(fields)] for i, line in enumerate(lines)]
    chats.write_text("".join(json.dumps(line) + "\n" for line in mixed))
    write_shards(chats, path / "shards", samples_per_shard=4)
    return path / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = [{"metric": "anls", "answers": ["0 1", "2"], "source": "scans"}, {"source": "plain"}]
    return write(tmp_path_factory.mktemp("heldout"), 10, fields)


def on_a_rank(model: Path, shards: Path, **changes: Any) -> dict[str, Any]:
    from evaluate import joined
    from evaluate_split import evaluate_split, open_model

    with joined("cpu"):
        settings = Settings(max_new_tokens=LENGTH, batch_size=3, **changes)
        return evaluate_split(open_model(model), [str(shards)], settings)


@pytest.fixture(scope="module")
def result(model: Path, shards: Path) -> dict[str, Any]:
    return run_ranks(on_a_rank, 1, model, shards)[0]


def stock_inputs(processor: Any, encoded: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": encoded.input_ids[None]}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
    if encoded.pixel_values is not None:
        inputs["pixel_values"] = encoded.pixel_values.float() / 127.5 - 1
        inputs["image_grid_thw"] = encoded.image_grid_thw
    return inputs


@torch.no_grad()
def test_loss_answers_and_flops_are_those_of_stock(
    model: Path, shards: Path, result: dict[str, Any]
) -> None:
    from transformers import AutoModelForImageTextToText

    from triptych_data.processor import Processor
    from triptych_data.shards.reader import Shards

    stock = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    processor = Processor.from_directory(model)
    products = [0]

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        rows = output.numel() // module.weight.shape[0]
        products[0] += 2 * rows * module.weight.numel()

    total, targets, attention, prompts, images, said = 0.0, 0, 0, 0, 0, []
    text, vision = stock.config.text_config, stock.config.vision_config
    for raw in Shards.open(shards):
        whole = processor.encode(raw)
        logits = stock(**stock_inputs(processor, whole)).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits, whole.shift_labels, reduction="none")
        total, targets = total + float(losses.sum()), targets + whole.num_targets

        prompt = processor.encode_prompt(raw)[0]
        hooks = [
            module.register_forward_hook(count)
            for module in stock.modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv3d)
        ]
        tokens = stock.generate(
            **stock_inputs(processor, prompt),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=processor.eos_token_id,
        )[0][len(prompt.input_ids) :].tolist()
        for hook in hooks:
            hook.remove()
        pairs = (n := len(prompt.input_ids) + len(tokens) - 1) * (n + 1) // 2
        width = text.num_attention_heads * text.head_dim
        attention += 4 * text.num_hidden_layers * width * pairs
        patches = [int(t * h * w) for t, h, w in prompt.image_grid_thw.tolist()]
        attention += sum(4 * vision.depth * vision.hidden_size * p * p for p in patches)
        prompts, images = prompts + len(prompt.input_ids), images + sum(patches) // 4
        if processor.eos_token_id in tokens:
            tokens = tokens[: tokens.index(processor.eos_token_id)]
        said.append(processor.decode(tokens))

    assert [each["answer"] for each in result["answers"]] == said
    assert len(set(said)) > 3
    assert result["loss"] == pytest.approx(total / targets, rel=1e-5)
    cost = result["cost"]
    assert (cost["questions"], cost["prompt_tokens"], cost["image_tokens"]) == (10, prompts, images)
    assert cost["flops"] == pytest.approx(products[0] + attention, rel=1e-9)
    assert cost["seconds"] > 0


def test_scores_by_metric_and_source(model: Path, result: dict[str, Any], tmp_path: Path) -> None:
    assert {(s["metric"], s["source"], s["count"]) for s in result["scores"]} == {
        ("anls", None, 5),
        ("anls", "scans", 5),
        ("exact_match", None, 5),
        ("exact_match", "plain", 5),
    }
    # What the model says is made the reference of every second sample.
    given = [each["answer"] for each in result["answers"]]
    right = [{"answers": ["?", answer] if i % 2 else ["?"]} for i, answer in enumerate(given)]
    found = run_ranks(on_a_rank, 1, model, write(tmp_path, 10, right))[0]
    assert found["scores"] == [{"metric": "exact_match", "source": None, "score": 0.5, "count": 10}]
    assert [each["score"] for each in found["answers"]] == [0, 1] * 5
    assert "exact_match  all            10  50.0 %" in table(found)


def test_bounds_change_what_images_cost(model: Path, shards: Path, result: dict[str, Any]) -> None:
    few = run_ranks(with_bounds, 1, model, shards)[0]
    assert (few["min_pixels"], few["max_pixels"]) == (256, 1024)
    assert few["cost"]["image_tokens"] < result["cost"]["image_tokens"]
    assert few["cost"]["flops"] < result["cost"]["flops"]
    assert few["loss"] != result["loss"]


def with_bounds(model: Path, shards: Path) -> dict[str, Any]:
    return on_a_rank(model, shards, min_pixels=256, max_pixels=1024)


def run_command(words: list[str]) -> tuple[str, str]:
    """What the command prints, and its error."""
    import contextlib
    import io

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            evaluate.main(words, standalone_mode=False)
    except ValueError as error:
        return printed.getvalue(), str(error)
    return printed.getvalue(), ""


def test_the_command_on_two_ranks_says_what_one_says(
    model: Path, shards: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    words = [str(model), "--shards", str(shards), "--device=cpu", f"--max-new-tokens={LENGTH}"]
    words += ["--batch-size=3", "-o", str(tmp_path / "a/out.json")]
    (said, error), (nothing, _) = run_ranks(run_command, 2, words)
    assert (error, nothing) == ("", "")
    assert f"loss {result['loss']:.4f}" in said
    written = json.loads((tmp_path / "a/out.json").read_text())
    assert written["world_size"] == 2
    assert written["answers"] == result["answers"]
    assert written["scores"] == result["scores"]
    assert written["loss"] == pytest.approx(result["loss"], rel=1e-6)
    for name in ("questions", "prompt_tokens", "image_tokens", "answer_tokens", "flops"):
        assert written["cost"][name] == result["cost"][name], name


def test_mistakes(model: Path, shards: Path, tmp_path: Path) -> None:
    helped = CliRunner().invoke(evaluate, ["--help"])
    assert helped.exit_code == 0 and "--max-pixels" in helped.output
    typo = CliRunner().invoke(evaluate, [str(model), "--shards", str(shards), "--max-pixel=1"])
    assert typo.exit_code == 2 and "--max-pixels" in typo.output
    words = [str(model), "--device=cpu", "--shards"]
    misspelt = write(tmp_path / "misspelt", 2, [{"metric": "anlss"}])
    broken = write(tmp_path / "broken", 3, [{}])
    damaged = broken / "shard-000000.tar"
    data = bytearray(damaged.read_bytes())
    data[700] ^= 1
    damaged.write_bytes(data)
    cases = [
        ([str(misspelt)], "sample 000000000: metric must be one of exact_match"),
        ([str(broken)], "of another checksum; the shard is damaged"),
        ([str(tmp_path / "nowhere")], "must be a shard, a folder"),
        ([str(shards), "--max-pixels=10"], "must be at least min_pixels"),
        ([str(shards), "--seq-len=8"], "seq_len"),
    ]
    errors = run_ranks(run_commands, 1, [[*words, *extra] for extra, _ in cases])[0]
    for (_, wanted), (said, error) in zip(cases, errors, strict=True):
        assert wanted in error
        assert not said


def run_commands(many: list[list[str]]) -> list[tuple[str, str]]:
    return [run_command(words) for words in many]
