"""Answers of a masked diffusion model: masks behind the prompt, filled in block by block.

Within a block every forward guesses all of its masks and keeps the surest ones; the others are
masked again (LLaDA's low-confidence remasking, arXiv 2502.09992, section 2.4). Blocks go from left
to right, and later ones are masks until their turn. Greedy: the same prompt, the same answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..packed import PackedModel
from ..prompt import Prompt, before_stop
from ..sequence import ALONE


class Unmasked(NamedTuple):
    """What a forward filled in: of answer number `prompt`, at these places, by these tokens."""

    step: int
    prompt: int
    places: list[int]
    tokens: list[int]
    confidence: list[float]


@dataclass
class _Canvas:
    """All prompts with their answers as one packed row."""

    input_ids: Tensor
    """(1, T)"""
    inputs: dict[str, Any]
    """what of a batch is the same in every forward"""
    answers: Tensor
    """(prompts, max_new_tokens) int64: where in T"""


@torch.no_grad()
def fill_in(
    model: PackedModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_token_id: int | list[int],
    synced: bool = False,
    trace: list[Unmasked] | None = None,
) -> list[list[int]]:
    """Answer each prompt by max_new_tokens masks filled in; ids up to and without the first EOS.

    trace gets every step, in order. synced is for ZeRO-3, where weights are gathered by all ranks
    together: every rank does as many forwards, also one without prompts. All ranks must call it.
    """
    if not prompts and not synced:
        return []
    assert model.diffusion is not None
    was_training, group = model.training, model.sequence
    model.eval()
    model.sequence = ALONE  # every rank has its prompts whole
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    canvas = _lay_out(model, prompts, max_new_tokens)
    step, length = 0, model.diffusion.block_length
    with torch.compiler.set_stance("force_eager"):  # or layers would compile for every length
        for block in canvas.answers.split(length, dim=1):
            for keep in _counts(block.shape[1], model.diffusion.tokens_per_step):
                found = _fill_step(model, canvas, block, keep)
                if trace is not None:
                    trace += _as_trace(step, found, canvas.answers, len(prompts))
                step += 1
            if not synced and _has_ended(canvas, int(block[0, -1] - canvas.answers[0, 0]), stops):
                break
    model.train(was_training)
    model.sequence = group
    tokens = canvas.input_ids[0][canvas.answers].tolist()[: len(prompts)]
    return [before_stop(row, stops) for row in tokens]


def show_trace(
    trace: Sequence[Unmasked],
    decode: Callable[[list[int]], str],
    *,
    prompt: int,
    max_new_tokens: int,
    mask: str = "·",
) -> list[str]:
    """A line a step: the answer as far as it is filled in, with `mask` for each token that is not.

    decode makes text of token ids.
    """
    known: dict[int, int] = {}
    lines = []
    for event in trace:
        if event.prompt != prompt:
            continue
        known |= dict(zip(event.places, event.tokens, strict=True))
        shown, run = "", list[int]()
        for place in range(max_new_tokens):
            if place in known:
                run.append(known[place])
                continue
            shown += (decode(run) if run else "") + mask
            run = []
        lines.append(shown + (decode(run) if run else ""))
    return lines


def _lay_out(model: PackedModel, prompts: Sequence[Prompt], max_new_tokens: int) -> _Canvas:
    """The prompts end to end, each followed by its masks; none gives a row of masks alone."""
    device = next(model.parameters()).device
    masks = torch.full((max_new_tokens,), model.mask_token_id)
    given = [prompt.input_ids.cpu() for prompt in prompts] or [masks[:1]]
    documents = [torch.cat([ids, masks]) for ids in given]
    lengths = torch.tensor([len(document) for document in documents])
    ends = lengths.cumsum(0)
    inputs = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None].to(device),
        "cu_seqlens": torch.nn.functional.pad(ends, (1, 0)).int().to(device),
        "max_seqlen": int(lengths.max()),
    }
    answers = ends[:, None] - max_new_tokens + torch.arange(max_new_tokens)
    return _Canvas(torch.cat(documents)[None].to(device), inputs, answers.to(device))


def _counts(length: int, each: int) -> list[int]:
    """How many tokens the steps of a block fill in."""
    return [min(each, length - done) for done in range(0, length, each)]


def _fill_step(
    model: PackedModel, canvas: _Canvas, block: Tensor, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the `keep` surest masks of each row of block (prompts, B): where, what, how sure."""
    assert model.diffusion is not None
    ids, mask = canvas.input_ids[0], model.mask_token_id
    hidden_states = model.hidden_states(input_ids=canvas.input_ids, **canvas.inputs)[0]
    rows = block if model.diffusion.predict == "same" else block - 1
    logits = model.hf.lm_head(hidden_states[rows]).float()  # (prompts, B, V)
    logits[..., mask] = -torch.inf  # it would stay one
    confidence, guesses = logits.softmax(-1).max(-1)  # (prompts, B)
    confidence = confidence.masked_fill(ids[block] != mask, -1.0)
    surest, index = confidence.topk(keep, dim=1)
    where, what = block.gather(1, index), guesses.gather(1, index)
    ids[where] = what
    return where, what, surest


def _as_trace(
    step: int, found: tuple[Tensor, Tensor, Tensor], answers: Tensor, count: int
) -> list[Unmasked]:
    where, what, surest = found
    places = (where - answers[:, :1]).tolist()
    rows = zip(places, what.tolist(), surest.tolist(), strict=True)
    return [Unmasked(step, number, *row) for number, row in enumerate(rows) if number < count]


def _has_ended(canvas: _Canvas, last: int, stops: set[int]) -> bool:
    """Whether every answer has a stop among its first last + 1 tokens."""
    done = canvas.input_ids[0][canvas.answers[:, : last + 1]].tolist()
    return all(stops & set(row) for row in done)
