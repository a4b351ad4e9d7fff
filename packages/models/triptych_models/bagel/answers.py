"""Greedy answers of a Bagel: prompts as one packed row, computed anew for every token."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..prompt import Prompt, before_stop
from .model import Bagel


@torch.no_grad()
def continue_prompts(
    model: Bagel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_token_id: int | list[int],
    synced: bool = False,
) -> list[list[int]]:
    """Continue each prompt greedily; the new token ids, up to and without the first EOS.

    There is no cache. synced is for ZeRO-3, where weights are gathered by all ranks together:
    every rank does as many forwards, also one without prompts. All ranks must call it.
    """
    if not prompts and not synced:
        return []
    was_training = model.training
    model.eval()
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.compiler.set_stance("force_eager"):  # or layers would compile for every length
        for _ in range(max_new_tokens):
            for answer, token in zip(answers, _next_tokens(model, prompts, answers), strict=True):
                answer.append(token)
            if not synced and all(stops & {*answer} for answer in answers):
                break
    model.train(was_training)
    return [before_stop(answer, stops) for answer in answers]


def _next_tokens(
    model: Bagel, prompts: Sequence[Prompt], answers: Sequence[list[int]]
) -> list[int]:
    device = next(model.parameters()).device
    documents = [
        torch.cat([prompt.input_ids.cpu(), torch.tensor(answer, dtype=torch.int64)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ] or [torch.zeros(1, dtype=torch.int64)]
    bounds = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    input_ids = torch.cat(documents)
    row: dict[str, Any] = {"input_ids": input_ids[None], "cu_seqlens": bounds}
    row |= _images(prompts, torch.cat(_of_images(prompts, answers, model)))
    row |= model.lay_out(**row)
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in row.items()
    }
    hidden_states = model.hidden_states(**moved, max_seqlen=len(input_ids))
    logits: Tensor = model.hf.lm_head(hidden_states[:, bounds[1:].to(device) - 1])
    return logits[0].argmax(-1).tolist()[: len(prompts)]


def _of_images(
    prompts: Sequence[Prompt], answers: Sequence[list[int]], model: Bagel
) -> list[Tensor]:
    """Which tokens of each document are images' (n,): none of an answer, whatever it says."""
    token = model.hf.config.image_token_id
    return [
        torch.cat([prompt.input_ids.cpu() == token, torch.zeros(len(answer), dtype=torch.bool)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ] or [torch.zeros(1, dtype=torch.bool)]


def _images(prompts: Sequence[Prompt], is_image: Tensor) -> dict[str, Any]:
    pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
    grids = [p.image_grid_thw for p in prompts if p.image_grid_thw is not None]
    if not sum(len(each) for each in pixels):
        return {}
    grid = torch.cat(grids).cpu()
    patches = grid.prod(1)
    return {
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": grid,
        "image_positions": is_image.nonzero().flatten(),
        "vision_cu_seqlens": torch.tensor([0, *accumulate(patches.tolist())]).int(),
        "vision_max_seqlen": int(patches.max()),
    }
