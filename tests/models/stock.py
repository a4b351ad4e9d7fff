"""The unpacked reference: stock transformers, one document after the other."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from tests.models.tiny import IMAGE, Document


def stock_twin(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A stock model with this model's weights and nothing of ours in it."""
    config = AutoConfig.for_model(**model.hf.config.to_dict())
    stock = type(model).hf_class._from_config(config, dtype=dtype)
    if hasattr(model, "blocks"):
        stock.set_experts_implementation("eager")  # the others know no fp64
    stock.load_state_dict(model.hf.state_dict(), strict=True)
    return stock


def stock_logits(stock: Any, model: Any, doc: Document) -> Tensor:
    """Logits (n, V) of one document; the stock model computes M-RoPE positions itself."""
    inputs = {"input_ids": doc.input_ids[None]}
    if len(doc.image_grid_thw):
        pixels = doc.pixel_values.to(stock.dtype).view(len(doc.pixel_values), 3, -1) / 255
        mean, std = (torch.tensor(x)[:, None] for x in (model.image_mean, model.image_std))
        inputs |= {
            "pixel_values": ((pixels - mean) / std).flatten(1),
            "image_grid_thw": doc.image_grid_thw,
            "mm_token_type_ids": (doc.input_ids == IMAGE).int()[None],
        }
    return stock(**inputs).logits[0]


def stock_loss(stock: Any, model: Any, documents: list[Document]) -> Tensor:
    """Loss summed over the targets of all documents."""
    losses = [
        F.cross_entropy(
            stock_logits(stock, model, doc), doc.shift_labels, ignore_index=-100, reduction="sum"
        )
        for doc in documents
    ]
    return torch.stack(losses).sum()
