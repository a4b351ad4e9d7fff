"""A model and a row without memory behind them, to plan a run on any machine; see `fake`."""

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .audio_model import AudioModel
from .bagel.model import Bagel
from .config import ModelConfig
from .experts import EVERY_EXPERT, ExpertGroup
from .families import build_shell
from .freeze import freeze
from .image_model import ImageModel
from .layout import tower
from .llava import Llava
from .llava_onevision import LlavaOnevision
from .lora import add_adapters
from .packed import PackedModel
from .sequence import ALONE, SequenceGroup

FRAMES_PER_SECOND = 100  # of log-mel features, of every model that hears


def build_pretend_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    sequence: SequenceGroup = ALONE,
    experts: ExpertGroup = EVERY_EXPERT,
) -> PackedModel:
    """The model of `build_model` on the meta device: config.json is read, weights are not."""
    if config.compile == "layers":
        # What the compiler keeps is what the fused ops keep: 0.3 % more on an H100 (BENCHMARKS.md).
        config = config.model_copy(update={"compile": "none", "fuse": True})
    with torch.device("meta"):
        model = build_shell(config, dtype=dtype, experts=experts)
        model.set_sequence(sequence)
        freeze(model, config.freeze)
        if config.lora is not None:
            add_adapters(model, config.lora, config.seed)
    return model.train()


def pretend_batch(
    model: PackedModel,
    seq_len: int,
    *,
    document_len: int,
    image_share: float,
    target_share: float,
    image_tokens: int,
    audio_share: float = 0.0,
    audio_seconds: float = 30.0,
) -> dict[str, Any]:
    """A packed row of full documents; call it inside `fake.pretend`, or for a real model.

    image_share of its tokens are those of square images of about image_tokens each; there is
    always one image, of one token where there should be none, unless the model has no tower.
    audio_share of them are those of recordings of audio_seconds each, where it hears.
    target_share of the other tokens are targets. Images, recordings and targets are spread evenly.
    """
    images: dict[str, Any] = {}
    taken: list[int] = []  # by images
    if tower(model.hf) is not None:
        side = max(1, round(math.sqrt(image_tokens))) if image_share else 1  # in tokens
        side = min(side, math.isqrt(seq_len))  # a row may be shorter than an image
        each = side**2
        if isinstance(model, Llava):
            side, each = model.grid_side, model.tokens_per_image
        document_len = min(max(document_len, each), seq_len)  # an image is within its document
        in_one = max(1, document_len // each)
        places = max(1, seq_len // document_len) * in_one
        count = max(1, min(round(seq_len * image_share / each), places))
        for image in range(count):
            document, place = divmod(places * image // count, in_one)
            start = document * document_len + document_len * place // in_one
            taken += range(start, start + each)
        images = _pretend_images(model, count, side) | {"image_positions": _known(taken)}
        if isinstance(model, LlavaOnevision):
            images |= {
                "image_taps": torch.zeros(len(taken), 4, dtype=torch.int64),
                "image_tap_weights": torch.full((len(taken), 4), 0.25),
            }
    if audio_share and isinstance(model, AudioModel):
        around = sorted(set(range(seq_len)) - set(taken))
        tokens = min(round(seq_len * audio_share), len(around))
        recordings = _pretend_recordings(model, around, tokens, audio_seconds)
        taken += recordings["audio_positions"].tolist() if recordings else []
        images |= recordings
    free = sorted(set(range(seq_len)) - set(taken)) or [0]
    num_targets = max(1, round(len(free) * target_share))
    labels = [-100] * seq_len
    for target in range(num_targets):
        labels[free[len(free) * target // num_targets]] = 0
    axes: tuple[int, ...] = ()
    if isinstance(model, ImageModel) and model.image_rules().get("position_axes") != 1:
        axes = (3,)  # of M-RoPE
    batch = {
        "input_ids": torch.zeros(1, seq_len, dtype=torch.int64),
        "shift_labels": _known([labels]),
        "num_targets": num_targets,
        "position_ids": torch.zeros(*axes, 1, seq_len, dtype=torch.int64),
        "cu_seqlens": _known([*range(0, seq_len, document_len), seq_len], torch.int32),
        "max_seqlen": min(document_len, seq_len),
        **images,
    }
    if isinstance(model, Bagel):
        known = {name: batch[name] for name in ("cu_seqlens", *images) if name != "pixel_values"}
        batch |= model.lay_out(input_ids=_known([[0] * seq_len]), **known)
    return batch


def _pretend_recordings(
    model: AudioModel, places: list[int], tokens: int, seconds: float
) -> dict[str, Any]:
    """As many recordings as have about so many tokens, in places of the row.

    One that would have more than all of them together is shorter; of too few for one there is none.
    """
    frames = round(seconds * FRAMES_PER_SECOND)
    frames = min(frames, model.stock_frames or frames)
    each = _tokens_of(model, frames)
    if each > tokens:
        frames = frames * tokens // each
        each = _tokens_of(model, frames)
    if not each:
        return {}
    count = min(round(tokens / each), len(places) // each)
    starts = [len(places) * recording // count for recording in range(count)]
    num_mels = model.hf.config.audio_config.num_mel_bins
    return {
        "audio_features": torch.zeros(count * (frames + model.frames_behind), num_mels),
        "audio_lengths": _known([frames] * count),
        "audio_positions": _known([places[at + token] for at in starts for token in range(each)]),
    }


def _tokens_of(model: AudioModel, frames: int) -> int:
    lengths = _known([frames])
    with unset_fake_temporarily():
        return int(model.audio_tokens(lengths))


def _pretend_images(model: Any, count: int, side: int) -> dict[str, Any]:
    """count images of side × side tokens each; of a LLaVA, patches."""
    height = side * getattr(model.hf.config.vision_config, "spatial_merge_size", 1)  # in patches
    patch_dim = model.dummy_image()[1].shape[1]
    return {
        "pixel_values": torch.zeros(count * height**2, patch_dim, dtype=torch.uint8),
        "image_grid_thw": _known([[1, height, height]] * count),
        "vision_cu_seqlens": _known([*range(0, count * height**2 + 1, height**2)], torch.int32),
        "vision_max_seqlen": height**2,
    }


def pretend_part(batch: dict[str, Any], model: PackedModel) -> dict[str, Any]:
    """The model's `take_part` of a row of `pretend_batch`."""
    with unset_fake_temporarily():  # or what is known would become fake, and have no value
        return dict(model.take_part(batch))


def _known(values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """A real tensor, though fake ones are made around: its values are read on the host."""
    with unset_fake_temporarily():
        return torch.tensor(values, dtype=dtype)
