"""Cases of the cross entropy of a linear layer."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .case import HALF, Case, randn


def loss_case(
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    ignored: float,
    chunk_rows: int,
    **terms: float,
) -> Case:
    from triptych_kernels import linear_cross_entropy, linear_cross_entropy_ref

    labels = torch.randint(vocabulary, (rows,), device="cuda")
    labels[torch.rand(rows, device="cuda") < ignored] = -100
    num_targets = int((labels != -100).sum())

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, weight, labels, chunk_rows=chunk_rows, num_targets=num_targets, **terms
        )

    more = "".join(f" {name}={value}" for name, value in terms.items())
    return Case(
        "linear_cross_entropy",
        f"N{rows} H{width} V{vocabulary} ignored {ignored:.0%} chunk {chunk_rows}{more}",
        dtype,
        [randn(rows, width, dtype=dtype), randn(vocabulary, width, dtype=dtype, seed=1) * 0.05],
        ours,
        lambda x, weight: linear_cross_entropy_ref(x, weight, labels, **terms),
    )


def cases() -> Iterator[Case]:
    for dtype in (HALF, torch.float16, torch.float32):
        for rows, vocabulary, ignored, chunk_rows in (
            (1, 1000, 0.0, 4096),
            (63, 760, 1.0, 4096),
            (1025, 32003, 0.5, 200),
            (2048, 151936, 0.0, 4096),
        ):
            yield loss_case(rows, 256, vocabulary, dtype, ignored, chunk_rows)
        for terms in ({"z_loss": 1e-3}, {"softcap": 15.0}, {"label_smoothing": 0.1}):
            yield loss_case(300, 256, 5000, dtype, 0.3, 128, **terms)


def timed() -> Iterator[Case]:
    yield loss_case(8192, 2048, 151936, HALF, 0.0, 4096)
    yield loss_case(8192, 2048, 151936, HALF, 0.75, 4096)
