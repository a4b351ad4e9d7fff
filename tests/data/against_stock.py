"""A model folder's samples through our processor and model, against stock's processor and model."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from tests.data.test_images import photo, save
from tests.models.stock import stock_twin
from triptych_data.batch import collate
from triptych_data.media.images import decode_image
from triptych_data.processor import Processor
from triptych_data.sample import RawSample
from triptych_models.config import ModelConfig
from triptych_models.families import build_model

_NO_INPUT = ("shift_labels", "num_targets", "num_tokens", "sample_keys")


def sample(sizes: list[tuple[int, int]]) -> RawSample:
    """A chat about photos of these widths and heights."""
    parts = [{"type": "image", "index": i} for i in range(len(sizes))]
    content = [*parts, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A boat at sea."},
    ]
    return RawSample("k", "x", {"messages": messages}, [save(photo(*size)) for size in sizes])


def packed_as_alone(folder: Path, samples: list[list[tuple[int, int]]]) -> dict[str, Any]:
    """Tokens of each sample, and logits of all in one row, are stock's one by one; -> the row."""
    model: Any = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    processor, twin = Processor.from_directory(folder), stock_twin(model)
    model.check_processor(processor)
    raws = [sample(sizes) for sizes in samples]
    encoded = [processor.encode(raw) for raw in raws]
    stock = AutoProcessor.from_pretrained(folder)
    expected = [_stock_inputs(stock, raw) for raw in raws]
    for ours, theirs in zip(encoded, expected, strict=True):
        assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    seq_len = sum(len(each.input_ids) for each in encoded) + 9
    axes = processor.position_axes
    batch = collate(encoded, seq_len, pad_token_id=processor.pad_token_id, position_axes=axes)
    with torch.no_grad():
        logits = model.logits(**{k: v for k, v in batch.items() if k not in _NO_INPUT})[0]
        alone = torch.cat([twin(**inputs).logits[0] for inputs in expected])
    torch.testing.assert_close(logits[: len(alone)], alone, rtol=1e-4, atol=1e-4)
    return batch


def _stock_inputs(stock: Any, raw: RawSample) -> Any:
    text = stock.apply_chat_template(raw.json["messages"], tokenize=False)
    images = [decode_image(data) for data in raw.media] or None
    return stock(text=[text], images=images, return_tensors="pt")
