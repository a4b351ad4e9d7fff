"""Masked diffusion against straight formulas: noise, loss and gradients, answers.

The reference is stock transformers in fp64, one document after the other, told by a mask of its own
to look both ways.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.models import tiny
from tests.models.stock import stock_twin
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.generate import generate
from triptych_models.masked_diffusion.config import FILE, DiffusionConfig, read_diffusion
from triptych_models.masked_diffusion.noise import MaskRow, context_weights, draw_mask
from triptych_models.masked_diffusion.sampler import Unmasked, fill_in, show_trace
from triptych_models.sequence import SequenceGroup
from triptych_models.sequence_batch import take_part

SEQ_LEN = 64
MASK = tiny.VOCAB - 1
LLADA = DiffusionConfig()
DREAM = DiffusionConfig(predict="next", weight="context", divide_by="masked", context_p=0.3)
both_styles = pytest.mark.parametrize("style", [LLADA, DREAM], ids=["llada", "dream"])


def build(path: Path, style: DiffusionConfig, dtype: torch.dtype = torch.float32) -> Any:
    if not path.exists():
        tiny.write_text_model_dir(path, tied=True)
    config = ModelConfig(path=path, init="random", diffusion=style, fuse=False)
    return build_model(config, dtype=dtype)


def row(lengths: tuple[int, ...] = (9, 1, 20, 11)) -> tuple[list[tiny.Document], dict[str, Any]]:
    """Documents of which all tokens but the first are targets; one more is a chat's answer."""
    documents = [tiny.document(seed, words=words) for seed, words in enumerate(lengths)]
    for number, document in enumerate(documents):
        document.shift_labels = torch.cat([document.input_ids[1:], torch.tensor([-100])])
        if number == len(documents) - 1:
            document.shift_labels[:4] = -100
    batch = tiny.pack_text(documents, SEQ_LEN)
    return documents, batch | {"sample_ids": [7 + i for i in range(len(documents))]}


def looks_both_ways(stock: Any, ids: Tensor) -> Tensor:
    """Logits (n, V) of one document (n,)."""
    everything = torch.zeros(1, 1, len(ids), len(ids), dtype=stock.dtype)
    return stock(ids[None], attention_mask=everything).logits[0]


def straight_loss(stock: Any, documents: list[tiny.Document], style: DiffusionConfig) -> Any:
    """Summed loss, maskable and masked tokens, token by token as the papers write it."""
    total, maskable, masked = torch.zeros((), dtype=torch.float64), 0, 0
    for sample, document in enumerate(documents):
        ids, n = document.input_ids, len(document.input_ids)
        may = [j > 0 and document.shift_labels[j - 1] != -100 for j in range(n)]
        may[0] = style.predict == "same" and n > 1 and bool(may[1])
        p, hidden = draw_mask(torch.tensor(may), style.min_p, 3, 7 + sample, 2)
        noisy = torch.where(hidden, MASK, ids)
        losses = looks_both_ways(stock, noisy).log_softmax(-1)
        maskable += sum(map(int, may))
        for j in hidden.nonzero().flatten().tolist():
            weight = 1 / p
            if style.weight == "context":
                seen = [k for k in range(n) if not hidden[k]]
                c = style.context_p
                weight = sum(c * (1 - c) ** (abs(j - k) - 1) / 2 for k in seen)
            total = total - weight * losses[j - (style.predict == "next"), ids[j]]
            masked += 1
    return total, maskable, masked


@both_styles
def test_loss_and_gradients_equal_the_formula_in_fp64(tmp_path: Path, style: Any) -> None:
    model = build(tmp_path / "model", style, torch.float64)
    stock = stock_twin(model, torch.float64)
    documents, batch = row()
    noised = MaskRow(style, MASK, seed=3)(batch, 2)
    expected, maskable, masked = straight_loss(stock, documents, style)
    assert noised["num_masked"] == masked == int((noised["shift_labels"] != -100).sum()) > 5
    assert noised["num_targets"] == (masked if style is DREAM else maskable)
    del noised["sample_ids"]
    out = model(**noised)
    assert out.num_targets == noised["num_targets"]
    (out.loss_sum / out.num_targets).backward()
    (expected / out.num_targets).backward()
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-6, atol=0)
    ours = dict(model.hf.named_parameters())
    for name, parameter in stock.named_parameters():
        difference = (ours[name].grad - parameter.grad).norm()
        # Weights are fp32.
        assert difference <= 1e-6 * parameter.grad.norm(), name


def test_context_weights_are_the_double_sum() -> None:
    masked = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.6
    place = torch.arange(40)
    distance = (place[:, None] - place).abs()
    kernel = torch.where(distance > 0, 0.3 * 0.7 ** (distance - 1.0) / 2, 0.0).double()
    torch.testing.assert_close(context_weights(masked, 0.3), kernel @ (~masked).double())


@both_styles
def test_noise_is_the_samples_own_and_never_the_rows(style: Any) -> None:
    _, batch = row()
    mask = MaskRow(style, MASK, seed=3)
    noised, again = mask(batch, 0), mask(batch, 0)
    names = ("input_ids", "shift_labels", "target_weights")
    assert all(torch.equal(noised[name], again[name]) for name in names)
    assert not torch.equal(noised["input_ids"], mask(batch, 1)["input_ids"])
    documents, _ = row()
    alone = tiny.pack_text([documents[2]], 32) | {"sample_ids": [9]}
    alone = mask(alone, 0)
    for name in names:
        assert torch.equal(alone[name][0, :20], noised[name][0, 10:30])
    other = MaskRow(style, MASK, seed=4)(batch, 0)
    assert not torch.equal(noised["input_ids"], other["input_ids"])


@both_styles
def test_masked_are_targets_alone_and_labels_stay_in_their_document(style: Any) -> None:
    _, batch = row()
    starts, ids = batch["cu_seqlens"].tolist(), batch["input_ids"][0]
    shift = int(style.predict == "next")
    for epoch in range(200):
        noised = MaskRow(style, MASK, seed=3)(batch, epoch)
        hidden = noised["input_ids"][0] == MASK
        labels, weights = noised["shift_labels"][0], noised["target_weights"][0]
        assert torch.equal(weights > 0, labels != -100)
        assert torch.equal(labels[weights > 0], ids[hidden])
        assert not hidden[41:].any() and not hidden[30:35].any()  # padding, the prompt of a chat
        assert not hidden[9]  # a document of one token has nothing to be guessed from
        if shift:
            assert not hidden[starts[:-1]].any()
        guessed_at = (labels != -100).nonzero().flatten()
        assert torch.equal(guessed_at, hidden.nonzero().flatten() - shift)


def test_p_is_uniform_and_the_loss_unbiased() -> None:
    may = torch.ones(50, dtype=torch.bool)
    drawn = [draw_mask(may, 1e-3, 0, sample, 5) for sample in range(4000)]
    p = torch.tensor([each for each, _ in drawn])
    assert 1e-3 <= p.min() < 0.01 and 0.99 < p.max() < 1
    assert p.mean() == pytest.approx(0.5, abs=0.02)
    share = torch.stack([masked.float().mean() for _, masked in drawn])
    assert (share - p).abs().mean() < 0.06
    # The expectation of the weights' sum is the number of maskable tokens: the divisor.
    assert (share / p).mean() == pytest.approx(1.0, abs=0.03)


def test_flops_are_of_both_halves_and_of_masked_rows(tmp_path: Path) -> None:
    model = build(tmp_path / "model", LLADA)
    _, batch = row()
    batch |= {"num_masked": SEQ_LEN, "num_targets": 3}
    inputs = {k: v for k, v in tiny.inputs_only(batch).items() if k not in ("sample_ids",)}
    del inputs["num_masked"]
    with FlopCounterMode(display=False) as counter:
        model.logits(**inputs).sum().backward()
    counts = counter.get_flop_counts()["Global"].items()
    linear = sum(n for operator, n in counts if "scaled_dot_product" not in str(operator))
    with FlopCounterMode(display=False) as rotary:
        model.hf.model.rotary_emb(torch.zeros(1), batch["position_ids"])
    pairs = sum(n * n for n in (9, 1, 20, 11, SEQ_LEN - 41))
    assert model.flops(batch) == linear - rotary.get_total_flops() + 3 * 2 * 2 * 2 * 64 * pairs


def test_parts_of_a_row_sum_to_it() -> None:
    _, batch = row()
    noised = MaskRow(LLADA, MASK, seed=3)(batch, 0)
    parts = [take_part(noised, SequenceGroup("", 4, rank)) for rank in range(4)]
    for name in ("num_targets", "num_masked"):
        assert sum(part[name] for part in parts) == noised[name]
    weights = torch.cat([part["target_weights"] for part in parts], 1)
    assert torch.equal(weights, noised["target_weights"])


def plain_answer(stock: Any, ids: Tensor, style: DiffusionConfig, length: int) -> Any:
    """An answer, and its trace, by loops over places."""
    text = [*ids.tolist(), *[MASK] * length]
    trace: list[Unmasked] = []
    for begin in range(0, length, style.block_length):
        places = range(begin, min(begin + style.block_length, length))
        while hidden := [i for i in places if text[len(ids) + i] == MASK]:
            chances = looks_both_ways(stock, torch.tensor(text))
            chances[:, MASK] = -torch.inf
            chances = chances.softmax(-1)
            shift = int(style.predict == "next")
            sure = {i: chances[len(ids) + i - shift].max(0) for i in hidden}
            best = sorted(hidden, key=lambda i: -sure[i].values)[: style.tokens_per_step]
            for i in best:
                text[len(ids) + i] = int(sure[i].indices)
            tokens, chance = [text[len(ids) + i] for i in best], [sure[i].values for i in best]
            trace.append(Unmasked(len(trace), 0, best, tokens, list(map(float, chance))))
    return text[len(ids) :], trace


@both_styles
def test_answers_and_their_trace_are_those_of_plain_loops(tmp_path: Path, style: Any) -> None:
    style = style.model_copy(update={"block_length": 4, "tokens_per_step": 3})
    model = build(tmp_path / "model", style)
    stock = stock_twin(model)
    prompts = [tiny.document(seed, words=words) for seed, words in enumerate((9, 3, 14))]
    trace: list[Unmasked] = []
    settings = {"max_new_tokens": 10, "eos_token_id": tiny.VOCAB + 1}
    answers = fill_in(model, prompts, **settings, trace=trace)
    with torch.no_grad():
        wanted = [plain_answer(stock, each.input_ids, style, 10) for each in prompts]
    assert answers == [tokens for tokens, _ in wanted]
    for number, (_, steps) in enumerate(wanted):
        mine = [event for event in trace if event.prompt == number]
        assert [e[2:4] for e in mine] == [e[2:4] for e in steps]
        for ours, theirs in zip(mine, steps, strict=True):
            assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-4)
    assert {len(event.tokens) for event in trace} == {3, 1, 2}  # 4 = 3 + 1, 2 = 2
    # Evaluation asks by way of generate; an answer ends before the first end token.
    ends = {"max_new_tokens": 10, "eos_token_id": answers[0][4], "pad_token_id": tiny.PAD}
    assert generate(model, prompts[:1], **ends) == [answers[0][: answers[0].index(answers[0][4])]]
    assert len(fill_in(model, [], max_new_tokens=6, eos_token_id=0, synced=True)) == 0


def test_a_trace_is_shown_line_by_line() -> None:
    trace = [
        Unmasked(0, 0, [2], [5], [0.9]),
        Unmasked(0, 1, [0], [1], [0.9]),
        Unmasked(1, 0, [0, 1], [3, 4], [0.8, 0.7]),
    ]
    lines = show_trace(trace, lambda ids: "".join(map(str, ids)), prompt=0, max_new_tokens=4)
    assert lines == ["··5·", "345·"]


def test_an_export_says_what_it_is_and_loads_in_stock(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "export"
    model = build(source, DREAM)
    export(model.hf, out, source, dtype=torch.float32, notes=DREAM.as_note(source))
    stock, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([3, MASK, 5, 6])
    with torch.no_grad():
        inputs = {"input_ids": ids[None], "position_ids": torch.arange(4)[None]}
        bounds = {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 4}
        ours = model.logits(**inputs, **bounds)[0]
        torch.testing.assert_close(looks_both_ways(stock, ids), ours, rtol=1e-4, atol=1e-5)
        assert (stock(ids[None]).logits[0, 0] - ours[0]).abs().max() > 0.01  # as stock has it
    assert read_diffusion(out) == DREAM.model_copy(update={"mask_token_id": MASK})
    with pytest.raises(ValueError, match=r"model.diffusion: must be set for a model that was"):
        ModelConfig(path=out).check_path()
    ModelConfig(path=out, diffusion=read_diffusion(out)).check_path()
    (out / FILE).write_text(json.dumps({"diffusion": {"predict": "both"}}))
    with pytest.raises(ValueError, match=r"diffusion.json: must hold the settings"):
        read_diffusion(out)


def test_what_cannot_be_diffused_is_refused(tmp_path: Path) -> None:
    moe = tiny.write_moe_model_dir(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"model.diffusion: must be left out unless the family"):
        ModelConfig(path=moe, diffusion=LLADA).check_path()
    with pytest.raises(ValueError, match=r"mask_token_id: must be below .*\(300\), got 300"):
        LLADA.model_copy(update={"mask_token_id": 300}).mask(300)
