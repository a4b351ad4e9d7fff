"""Packed documents: which document each token of a row belongs to, found without a host read."""

from itertools import pairwise

import torch
from torch import Tensor

from .dispatch import is_traced


def check_cu_seqlens(op: str, cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` is (num_docs + 1,) and rises from 0 to `num_tokens`.

    The values are looked at on the CPU only: on CUDA that would wait for the device.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens must be (num_docs + 1,) int32 with at least one document, got "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; convert it where the batch is made"
        )
    if cu_seqlens.device.type != "cpu" or is_traced(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to {num_tokens}, the number of tokens, got "
            f"{bounds}; the padding tail must be a document too"
        )


def document_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """-> (T,) int64: the number of the document that holds each token; empty ones hold none."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, tokens, right=True) - 1


def position_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """-> (T,) int64: how many tokens of its document come before each token."""
    starts = cu_seqlens.long()[document_of(cu_seqlens, num_tokens)]
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts
