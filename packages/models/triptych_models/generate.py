"""Greedy decoding through transformers' own `generate`, with a KV cache.

Of a model of masked diffusion: masks filled in, see triptych_models.masked_diffusion.sampler. Of a
Bagel: without a cache, see triptych_models.bagel.answers.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from .audio_model import AudioModel
from .bagel.answers import continue_prompts
from .bagel.model import Bagel
from .layout import text_config
from .llava import Llava
from .llava_onevision import LlavaOnevision
from .masked_diffusion.sampler import fill_in
from .packed import PackedModel
from .prompt import Prompt, before_stop
from .qwen3_vl import Qwen3VL
from .vision import normalize_pixels


def generate(
    model: PackedModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_token_id: int | list[int],
    pad_token_id: int,
    synced: bool = False,
) -> list[list[int]]:
    """Continue each prompt greedily; the new token ids, up to and without the first EOS.

    synced is for ZeRO-3, where weights are gathered by all ranks together: ranks that are done, or
    have no prompts, keep in step until the last one is done. All ranks must call it.
    """
    if not prompts and not synced:
        return []
    if model.diffusion is not None:
        return fill_in(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            synced=synced,
        )
    if isinstance(model, Bagel):
        return continue_prompts(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            synced=synced,
        )
    inputs = model_inputs(model, prompts, pad_token_id, force_image=synced)
    was_training = model.training
    model.eval()
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=has_cache(model),
        max_new_tokens=max_new_tokens if prompts else 1,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    with torch.compiler.set_stance("force_eager"):  # or layers would compile again for the cache
        tokens = model.hf.generate(**inputs, synced_gpus=synced, generation_config=settings)
    model.train(was_training)
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # else only new ones come
    new_tokens = tokens[: len(prompts), given:].tolist()
    return [before_stop(row, stops) for row in new_tokens]


def has_cache(model: PackedModel) -> bool:
    """Whether stock keeps what it computed: not of Gated DeltaNet alone, whose cache has no length
    to it (transformers 5.22, cache_utils.py), so that every token computes all before it."""
    types = getattr(text_config(model.hf.config), "layer_types", None)
    return types is None or "linear_attention" not in types or "full_attention" in types


def model_inputs(
    model: PackedModel, prompts: Sequence[Prompt], pad_token_id: int, *, force_image: bool
) -> dict[str, Tensor]:
    """Inputs (B, L) of `generate`, on the model's device.

    With force_image a batch without images gets one, and silence where the model hears: their
    tokens stand in the padding, where attention does not look, so the towers run on every rank as
    ZeRO-3 needs.
    """
    rows = [prompt.input_ids.cpu() for prompt in prompts] or [torch.tensor([pad_token_id])]
    room = model.tokens_per_image if isinstance(model, Llava) else 1
    if isinstance(model, LlavaOnevision):
        return embedded_inputs(model, prompts, rows, pad_token_id)
    if isinstance(model, AudioModel):
        room += model.dummy_tokens
    inputs = left_padded(rows, pad_token_id, room=room if force_image else 0)
    if isinstance(model, Qwen3VL):
        inputs |= image_inputs(model, prompts, inputs["input_ids"], force=force_image)
    elif isinstance(model, Llava):
        inputs |= whole_image_inputs(model, prompts, inputs["input_ids"], force=force_image)
    if isinstance(model, AudioModel):
        inputs.pop("mm_token_type_ids", None)  # stock goes by the tokens around a medium
        inputs |= audio_inputs(model, prompts, inputs["input_ids"], force=force_image)
    device = next(model.parameters()).device
    return {name: x.to(device) for name, x in inputs.items()}


def left_padded(rows: list[Tensor], pad_token_id: int, *, room: int) -> dict[str, Tensor]:
    """Rows of several lengths as (B, L), with at least `room` tokens of padding before each."""
    length = max(len(row) for row in rows) + room
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, length - len(row) :] = row
        attention_mask[i, length - len(row) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def image_inputs(
    model: Qwen3VL, prompts: Sequence[Prompt], input_ids: Tensor, *, force: bool
) -> dict[str, Tensor]:
    """What stands for images: their tokens in input_ids (B, L), and their pixels.

    Stock makes positions from grids, but not of a video that comes as an image: then ours go in.
    """
    config = model.hf.config
    has_video = bool((input_ids == config.video_token_id).any())
    # A video comes as images, and stock looks for their token; what it embeds is replaced anyway.
    input_ids = input_ids.masked_fill(input_ids == config.video_token_id, config.image_token_id)
    inputs = {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == config.image_token_id).int(),
    }
    grids = [p.image_grid_thw.cpu() for p in prompts if p.image_grid_thw is not None]
    pixels = [p.pixel_values.cpu() for p in prompts if p.pixel_values is not None]
    has_image = any(len(grid) for grid in grids)
    if force and not has_image:
        input_ids[0, 0] = config.image_token_id  # after the types: no position is made of it
        grid, patches = model.dummy_image()
        grids, pixels = [grid], [patches]
    if force or has_image:
        device = next(model.parameters()).device
        patches = torch.cat(pixels).to(device)
        inputs["image_grid_thw"] = torch.cat(grids)
        inputs["pixel_values"] = normalize_pixels(patches, model.image_mean, model.image_std)
    has_axes = any(len(prompt.position_ids) == 3 for prompt in prompts)
    is_moving = any(bool((grid[:, 0] > 1).any()) for grid in grids)
    # Tokens of sound may stand among those of a video, however short.
    if has_axes and (is_moving or (has_video and isinstance(model, AudioModel))):
        inputs["position_ids"] = padded_positions(prompts, input_ids.shape[1])
    return inputs


def audio_inputs(
    model: AudioModel, prompts: Sequence[Prompt], input_ids: Tensor, *, force: bool
) -> dict[str, Tensor]:
    """What stands for recordings: frames (audios, num_mels, longest), and which are not padding."""
    lengths = [p.audio_lengths.cpu() for p in prompts if p.audio_lengths is not None]
    frames = [p.audio_features.cpu() for p in prompts if p.audio_features is not None]
    if force and not any(len(each) for each in lengths):
        silence, length = model.dummy_audio()
        frames, lengths = [silence], [length]
        # In the padding, behind an image's.
        input_ids[0, 1 : 1 + model.dummy_tokens] = model.hf.config.audio_token_id
    if not frames:
        return {}
    counts = torch.cat(lengths)
    rows = torch.cat(frames).split((counts + model.frames_behind).tolist())
    padded = pad_sequence(rows, batch_first=True)
    if model.stock_frames is not None:
        padded = padded[:, : model.stock_frames]
        padded = pad(padded, (0, 0, 0, model.stock_frames - padded.shape[1]))
    is_frame = torch.arange(padded.shape[1]) < counts[:, None]
    return {"input_features": padded.mT, "feature_attention_mask": is_frame.long()}


def padded_positions(prompts: Sequence[Prompt], length: int) -> Tensor:
    """(4, B, length): places in the text, then M-RoPE's, as stock's decoder takes them."""
    positions = torch.zeros(4, len(prompts), length, dtype=prompts[0].position_ids.dtype)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.input_ids)
        positions[0, row, start:] = torch.arange(length - start)
        positions[1:, row, start:] = prompt.position_ids
    return positions


@torch.no_grad()
def embedded_inputs(
    model: LlavaOnevision, prompts: Sequence[Any], rows: list[Tensor], pad_token_id: int
) -> dict[str, Tensor]:
    """What the language model is given (B, L, H): stock would arrange features by the sizes of
    images, a prompt has image_positions, image_taps and image_tap_weights. All ranks run the tower.
    """
    device = next(model.parameters()).device
    batch: dict[str, Any] = {"input_ids": torch.cat(rows)[None]}
    begins = [0, *accumulate(map(len, rows))]
    placed = zip(prompts, begins, strict=False)
    seen = [(prompt, begin) for prompt, begin in placed if prompt.image_taps is not None]
    if seen:
        starts = [0, *accumulate(len(prompt.pixel_values) for prompt, _ in seen)]
        taps = [prompt.image_taps.cpu() for prompt, _ in seen]
        moved = [torch.where(t < 0, t, t + n) for t, n in zip(taps, starts, strict=False)]
        batch |= {
            "pixel_values": torch.cat([prompt.pixel_values.cpu() for prompt, _ in seen]),
            "image_positions": torch.cat([p.image_positions.cpu() + begin for p, begin in seen]),
            "image_taps": torch.cat(moved),
            "image_tap_weights": torch.cat([prompt.image_tap_weights.cpu() for prompt, _ in seen]),
        }
    embedded = model.embed(**{name: x.to(device) for name, x in batch.items()})[0]
    mask = left_padded(rows, pad_token_id, room=0)["attention_mask"].to(device)
    inputs_embeds = embedded.new_zeros(*mask.shape, embedded.shape[-1])
    inputs_embeds[mask.bool()] = embedded
    return {"inputs_embeds": inputs_embeds, "attention_mask": mask}


def whole_image_inputs(
    model: Llava, prompts: Sequence[Prompt], input_ids: Tensor, *, force: bool
) -> dict[str, Tensor]:
    """As `image_inputs`, for a tower that takes images of one size uncut."""
    pixels = [p.pixel_values.cpu() for p in prompts if p.pixel_values is not None]
    pixels = [patches for patches in pixels if len(patches)]
    if force and not pixels:
        _, patches = model.dummy_image()
        input_ids[0, : model.tokens_per_image] = model.hf.config.image_token_id  # all of it padding
        pixels = [patches]
    if not pixels:
        return {}
    device = next(model.parameters()).device
    scaled = normalize_pixels(torch.cat(pixels).to(device), model.image_mean, model.image_std)
    return {"pixel_values": model.whole_images(scaled)}
