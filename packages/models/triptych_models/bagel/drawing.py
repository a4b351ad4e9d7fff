"""Images out of noise: Euler's steps of the rectified flow, guided away from what has no words."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .join import image_document, patches_of
from .model import Bagel


@torch.no_grad()
def draw(
    model: Bagel,
    words: Sequence[Sequence[int]],
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    shift: float,
) -> Tensor:
    """Latents (N, C, H, W) fp32 for N prompts, token ids of words, from noise of that shape.

    Times go from 1 to 0, evenly before they are shifted: t becomes s t / (1 + (s - 1) t). A guided
    velocity is free + guidance (told - free); with 1 the free one is not computed. All of a step is
    one packed row. Under ZeRO-3 all ranks must call it with as many steps.
    """
    was_training = model.training
    model.eval()
    patch = model.hf.config.latent_patch_size
    height, width = (side // patch for side in noise.shape[2:])
    prompts = [*words, *([] if guidance == 1.0 else [[]] * len(words))]
    row = _lay_out(model, prompts, (height, width))
    x = patches_of(noise.float(), model.hf.config)  # (N, L, latent_dim)
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = (shift * even / (1 + (shift - 1) * even)).tolist()
    with torch.compiler.set_stance("force_eager"):  # or layers would compile for this row
        for time, following in pairwise(times):
            velocity = _velocity(model, row, x, time, guidance)
            x = x + (following - time) * velocity
    model.train(was_training)
    channels = noise.shape[1]
    cut = x.view(len(x), height, width, patch, patch, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(noise.shape)


def _velocity(
    model: Bagel, row: dict[str, Tensor | int], x: Tensor, time: float, guidance: float
) -> Tensor:
    """Where x (N, L, latent_dim) moves at a time."""
    both = x if guidance == 1.0 else torch.cat([x, x])
    latents = both.flatten(0, 1)
    times = torch.full((len(latents),), time, device=x.device)
    inputs = {**row, "latents": latents, "latent_noise": latents, "latent_times": times}
    hidden_states = model.hidden_states(**inputs)  # type: ignore[arg-type]
    positions = inputs["latent_positions"]
    assert isinstance(positions, Tensor)
    found = model.velocities(hidden_states, positions).float().view(both.shape)
    if guidance == 1.0:
        return found
    told, free = found.chunk(2)
    return free + guidance * (told - free)


def _lay_out(
    model: Bagel, prompts: Sequence[Sequence[int]], grid: tuple[int, int]
) -> dict[str, Tensor | int]:
    """A row of a document for each prompt, with all that does not change from step to step."""
    count = grid[0] * grid[1]
    documents = [image_document(model.hf.config, ids, count) for ids in prompts]
    ends = list(accumulate(map(len, documents)))
    starts = torch.tensor(ends)[:, None] - 1 - count
    row: dict[str, Tensor | int] = {
        "input_ids": torch.tensor([ids for document in documents for ids in document])[None],
        "cu_seqlens": torch.tensor([0, *ends]).int(),
        "max_seqlen": max(map(len, documents)),
        "latent_positions": (starts + torch.arange(count)).flatten(),
        "latent_grids": torch.tensor([grid] * len(prompts)),
    }
    row |= model.lay_out(**row, latent_times=torch.ones(count * len(prompts)))
    device = next(model.parameters()).device
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in row.items()}
