"""The yardstick of tools/bench_train.py for mixtures: transformers' own model on packed rows."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.initialization import no_init_weights

from triptych_models.attention import packed_attention
from triptych_models.output import LossOutput
from triptych_models.packed import PackedModel

WIDEST = 8192  # rows of logits at once: 2.5 GB in bf16 for a vocabulary of 152k, more in fp32
VARLEN = "bench_varlen"


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Attention goes by cu_seqlens."""


class StockModel(nn.Module):
    """A stock causal LM, its experts by torch's grouped_mm as transformers calls it.

    Attention is the varlen kernel, as without padding it has to be; norms, gates, rotary, routers
    and the cross entropy on fp32 logits are transformers' and torch's own, uncompiled.

    Args:
        path: a folder with config.json.
        like: our model of the same shape, which counts FLOPs and knows what a row has to have.
    """

    def __init__(self, path: Path, like: PackedModel) -> None:
        super().__init__()
        AttentionInterface.register(VARLEN, packed_attention)
        AttentionMaskInterface.register(VARLEN, no_mask)
        with no_init_weights():
            self.hf = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(path),
                dtype=torch.bfloat16,
                attn_implementation=VARLEN,
                experts_implementation="grouped_mm",
            )
        self.flops = like.flops

    def forward(self, *, shift_labels: Tensor, num_targets: int, **batch: Any) -> LossOutput:
        """Summed cross entropy of one packed row, without the routers' losses."""
        hidden = self.hf.model(use_cache=False, **batch).last_hidden_state
        total = hidden.new_zeros((), dtype=torch.float32)
        pieces = hidden[0].split(WIDEST), shift_labels[0].split(WIDEST)
        for rows, labels in zip(*pieces, strict=True):
            if len(pieces[0]) > 1:  # several would not fit beside each other
                total = total + checkpoint(self._loss, rows, labels, use_reentrant=False)
            else:
                total = total + self._loss(rows, labels)
        return LossOutput(total, num_targets, {})

    def _loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.hf.lm_head(rows).float(), labels, reduction="sum")
