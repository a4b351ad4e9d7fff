"""The cross entropy kernel on the CPU, in float32.

Run by test_interpreted.py, or: TRITON_INTERPRET=1 pytest and this file's path.
"""

import pytest
import torch

from triptych_kernels import linear_cross_entropy, linear_cross_entropy_ref

pytestmark = pytest.mark.usefixtures("poison")

TERMS = [
    {},
    {"z_loss": 0.1},
    {"softcap": 1.5},
    {"label_smoothing": 0.3},
    {"z_loss": 0.05, "softcap": 3, "label_smoothing": 0.1},
]


def problem(num_rows, vocabulary):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=generator) for n in (num_rows, vocabulary))
    labels = torch.randint(vocabulary, (num_rows,), generator=generator)
    labels[1::3] = -100
    return x, weight, labels, torch.rand(num_rows, generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("vocabulary", [63, 9001])
def test_terms(check, vocabulary, terms, weighted):
    x, weight, labels, weights = problem(5, vocabulary)
    terms = {**terms, "weights": weights if weighted else None}
    check(
        lambda x, w: linear_cross_entropy(x, w, labels, chunk_rows=3, backend="triton", **terms),
        lambda x, w: linear_cross_entropy_ref(x, w, labels, **terms),
        x,
        weight,
    )


def test_losses_per_token_and_halves_of_weights():
    x, weight, labels, weights = problem(5, 63)
    options = {"weights": weights.bfloat16(), "return_per_token": True, **TERMS[-1]}
    loss, losses = linear_cross_entropy(x, weight, labels, backend="triton", **options)
    plain_loss, plain_losses = linear_cross_entropy_ref(x, weight, labels, **options)
    torch.testing.assert_close((loss, losses), (plain_loss, plain_losses))


def test_a_capped_logit_far_outside_is_the_cap():
    x, weight = torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0], [0.0]])
    labels = torch.tensor([1])
    ours = linear_cross_entropy(x, weight, labels, softcap=5.0, backend="triton")
    torch.testing.assert_close(ours, linear_cross_entropy_ref(x, weight, labels, softcap=5.0))
