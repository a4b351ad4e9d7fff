"""Tiny models that hear, documents for them, and packed rows built by hand."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import tiny
from tests.models.tiny import END, IMAGE, MERGE, PATCH_DIM, START

AUDIO, AUDIO_START, AUDIO_END = 296, 297, 298
MELS, WINDOW = 8, 4  # of a window two make a chunk
PLACES = 16  # of an Aero's tower, after a convolution of stride 2


def write_qwen2_5_omni_model_dir(directory: Path, **fields: Any) -> Path:
    """A Qwen2.5-Omni's thinker, as `thinker_config` of published folders says it."""
    vision = written(tiny.write_qwen2_5_vl_model_dir(directory))["vision_config"]
    text = written(tiny.write_qwen2_model_dir(directory)) | {
        "model_type": "qwen2_5_omni_text",
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    audio = {
        "model_type": "qwen2_5_omni_audio_encoder",
        "num_mel_bins": MELS,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 40,
        "d_model": 32,
        "n_window": WINDOW,
        "output_dim": 32,
        "initializer_range": 0.1,
    }
    thinker = {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "text_config": text,
        "vision_config": vision | {"model_type": "qwen2_5_omni_vision_encoder"},
        "audio_config": audio,
        "image_token_index": IMAGE,
        "video_token_index": 295,
        "audio_token_index": AUDIO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "audio_start_token_id": AUDIO_START,
        "audio_end_token_id": AUDIO_END,
    }
    (directory / "config.json").write_text(json.dumps(thinker | fields))
    return directory


def written(directory: Path) -> Any:
    """What config.json of a folder says."""
    return json.loads((directory / "config.json").read_text())


@dataclass
class Document(tiny.Document):
    """One that may be heard, too."""

    audio_features: Tensor = field(default_factory=lambda: torch.zeros(0, MELS))  # (N, MELS)
    audio_lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


def tokens_of(frames: int) -> int:
    """Tokens of so many frames of a recording."""
    return ((frames - 1) // 2 + 1) // 2


def tokens_of_chunks(frames: int) -> int:
    """The same of a Qwen3-Omni."""
    return frames // 100 * 13 + -(-(frames % 100) // 8)


def document(
    seed: int,
    *,
    words: int,
    media: Sequence[int | tuple[int, int, int]] = (),
    tokens: Callable[[int], int] = tokens_of,
) -> Document:
    """Text, then each medium followed by text: frames of a recording, or an image's grid."""
    rng = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    positions: list[tuple[int, int, int]] = []

    def add(tokens: list[int]) -> None:
        start = max((max(p) for p in positions), default=-1) + 1
        ids.extend(tokens)
        positions.extend((start + i,) * 3 for i in range(len(tokens)))

    def add_words() -> None:
        add(torch.randint(0, 280, (words,), generator=rng).tolist())

    add_words()
    for medium in media:
        if isinstance(medium, int):
            add([AUDIO_START, *[AUDIO] * tokens(medium), AUDIO_END])
        else:
            add([START])
            at = positions[-1][0] + 1
            _, rows, columns = (1, medium[1] // MERGE, medium[2] // MERGE)
            ids.extend([IMAGE] * (rows * columns))
            positions.extend((at, at + i, at + j) for i in range(rows) for j in range(columns))
            add([END])
        add_words()
    grids = [medium for medium in media if not isinstance(medium, int)]
    lengths = [medium for medium in media if isinstance(medium, int)]
    input_ids = torch.tensor(ids)
    shift_labels = torch.cat((input_ids[1:], torch.tensor([-100])))
    shift_labels[::2] = -100
    patches = sum(t * h * w for t, h, w in grids)
    return Document(
        input_ids,
        torch.tensor(positions).T,
        shift_labels,
        torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        torch.randint(0, 256, (patches, PATCH_DIM), generator=rng).to(torch.uint8),
        torch.randn(sum(lengths), MELS, generator=rng),
        torch.tensor(lengths, dtype=torch.int64),
    )


def pack(documents: list[Document], seq_len: int) -> dict[str, Any]:
    """One packed row of seq_len tokens; the padding tail is the last document."""
    batch = tiny.pack(list(documents), seq_len)
    lengths = torch.cat([torch.zeros(0).long(), *(doc.audio_lengths for doc in documents)])
    if len(lengths):
        batch |= {
            "audio_features": torch.cat([doc.audio_features for doc in documents]),
            "audio_lengths": lengths,
            "audio_positions": (batch["input_ids"][0] == AUDIO).nonzero().flatten(),
        }
    return batch


def heard_and_seen() -> list[Document]:
    """Text; an image and a recording of two chunks; two recordings that need padding; a recording
    of less than a chunk and an image."""
    shapes = [(9, []), (3, [(1, 4, 6), 16]), (3, [13, 6]), (4, [5, (1, 4, 4)])]
    return [document(i, words=n, media=media) for i, (n, media) in enumerate(shapes)]


def heard_in_chunks() -> list[Document]:
    """Text; an image and a recording of less than a chunk; two that need padding, one of them of
    two windows; a short recording and an image."""
    shapes = [(5, []), (2, [(1, 4, 6), 45]), (2, [230, 101]), (3, [61, (1, 4, 4)])]
    return [
        document(i, words=n, media=media, tokens=tokens_of_chunks)
        for i, (n, media) in enumerate(shapes)
    ]


def write_aero_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """An Aero: a tower of sixteen places before a Qwen2."""
    heard = written(write_qwen2_5_omni_model_dir(directory))
    audio = heard["audio_config"] | {
        "model_type": "qwen2_audio_encoder",
        "max_source_positions": PLACES,
    }
    del audio["n_window"], audio["output_dim"]
    config = {
        "architectures": ["AeroForConditionalGeneration"],
        "model_type": "aero",
        "text_config": written(tiny.write_qwen2_model_dir(directory, tied=tied)),
        "audio_config": audio,
        "audio_token_index": AUDIO,
    }
    (directory / "preprocessor_config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def heard_only() -> list[Document]:
    """Text; a recording as long as the tower hears; two, of which one is odd; a short one."""
    shapes = [(9, []), (3, [2 * PLACES]), (3, [13, 22]), (4, [9])]
    made = [document(i, words=n, media=media) for i, (n, media) in enumerate(shapes)]
    for doc in made:  # silence, but for what lies beyond the longest
        rows = []
        for frames in doc.audio_features.split(doc.audio_lengths.tolist()):
            behind = torch.full((2, MELS), -0.7)
            behind[max(0, 2 * PLACES - len(frames)) :] = 0
            rows.append(torch.cat((frames, behind)))
        doc.audio_features = torch.cat(rows) if rows else doc.audio_features
    return made


def pack_heard(documents: list[Document], seq_len: int) -> dict[str, Any]:
    """One packed row with plain positions."""
    batch = pack(documents, seq_len)
    starts = batch["cu_seqlens"].long()
    lengths = starts.diff()
    positions = torch.arange(seq_len) - torch.repeat_interleave(starts[:-1], lengths)
    return batch | {"position_ids": positions[None]}


def aero_logits(stock: Any, model: Any, doc: Document) -> Tensor:
    """Logits (n, V) of one document; stock pads recordings with silence."""
    inputs: dict[str, Tensor] = {
        "input_ids": doc.input_ids[None],
        "attention_mask": torch.ones_like(doc.input_ids)[None],
    }
    if len(doc.audio_lengths):
        rows = doc.audio_features.to(stock.dtype).split((doc.audio_lengths + 2).tolist())
        padded = torch.full((len(rows), 2 * PLACES, MELS), -0.7, dtype=stock.dtype)
        for place, frames in zip(padded, rows, strict=True):
            place[: len(frames)] = frames[: 2 * PLACES]
        is_frame = torch.arange(2 * PLACES) < doc.audio_lengths[:, None]
        inputs |= {"input_features": padded.mT, "feature_attention_mask": is_frame.long()}
    logits: Tensor = stock(**inputs).logits[0]
    return logits


def omni_logits(stock: Any, model: Any, doc: Document) -> Tensor:
    """Logits (n, V) of one document; stock computes positions and cuts recordings itself."""
    inputs: dict[str, Tensor] = {
        "input_ids": doc.input_ids[None],
        "attention_mask": torch.ones_like(doc.input_ids)[None],
    }
    if len(doc.image_grid_thw):
        pixels = doc.pixel_values.to(stock.dtype).view(len(doc.pixel_values), 3, -1) / 255
        mean, std = (torch.tensor(x)[:, None] for x in (model.image_mean, model.image_std))
        inputs["pixel_values"] = ((pixels - mean) / std).flatten(1)
        inputs["image_grid_thw"] = doc.image_grid_thw
    if len(doc.audio_lengths):
        each = doc.audio_features.to(stock.dtype).split(doc.audio_lengths.tolist())
        padded = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)  # (audios, frames, MELS)
        frames = torch.arange(padded.shape[1])
        inputs["input_features"] = padded.mT
        inputs["feature_attention_mask"] = (frames < doc.audio_lengths[:, None]).long()
    logits: Tensor = stock(**inputs).logits[0]
    return logits


def write_qwen3_omni_model_dir(directory: Path, **fields: Any) -> Path:
    """A Qwen3-Omni's thinker: chunks of a hundred frames, two of them a window of attention."""
    seen = written(tiny.write_vl_moe_model_dir(directory))
    heard = written(write_qwen2_5_omni_model_dir(directory))
    audio = heard["audio_config"] | {
        "model_type": "qwen3_omni_moe_audio_encoder",
        "n_window": 50,
        "n_window_infer": 200,
        "conv_chunksize": 500,
        "downsample_hidden_size": 6,
    }
    text = seen["text_config"] | {"model_type": "qwen3_omni_moe_text"}
    del text["tie_word_embeddings"]
    thinker = {
        "architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"],
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": text,
        "vision_config": seen["vision_config"] | {"model_type": "qwen3_omni_moe_vision_encoder"},
        "audio_config": audio,
        "image_token_id": IMAGE,
        "video_token_id": 295,
        "audio_token_id": AUDIO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "audio_start_token_id": AUDIO_START,
        "audio_end_token_id": AUDIO_END,
    }
    (directory / "config.json").write_text(json.dumps(thinker | fields))
    return directory
