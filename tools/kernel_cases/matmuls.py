"""Cases of the mixture of experts and of Newton-Schulz."""

from collections.abc import Iterator

import torch

from .case import HALF, Case, randn


def moe_case(
    tokens: int, experts: int, width: int, expert_width: int, top_k: int, used: int
) -> Case:
    """Only the first `used` experts are chosen, the others stay empty."""
    from triptych_kernels import moe_mlp, moe_mlp_ref

    generator = torch.Generator("cuda").manual_seed(4)
    scores = torch.rand(tokens, used, generator=generator, device="cuda")
    weights, chosen = scores.topk(top_k, dim=-1)
    return Case(
        "moe_mlp",
        f"T{tokens} E{experts} ({used} used) H{width} F{expert_width} top-{top_k}",
        HALF,
        [
            randn(tokens, width),
            randn(experts, 2 * expert_width, width, seed=1) * width**-0.5,
            randn(experts, width, expert_width, seed=2) * expert_width**-0.5,
            (weights / weights.sum(-1, keepdim=True)).to(HALF),
        ],
        lambda x, gate_up, down, weights: moe_mlp(x, gate_up, down, weights, chosen),
        lambda x, gate_up, down, weights: moe_mlp_ref(x, gate_up, down, weights, chosen),
        slack=4e-3,  # the few weights of one token can all be rounded by almost half a digit
    )


def moe_cases() -> Iterator[Case]:
    yield moe_case(511, 16, 256, 128, 4, used=16)
    yield moe_case(511, 16, 256, 128, 2, used=3)
    yield moe_case(1, 8, 64, 64, 2, used=8)
    yield moe_case(0, 8, 64, 64, 2, used=8)


def moe_timed() -> Iterator[Case]:
    yield moe_case(8192, 128, 2048, 768, 8, used=128)


def newton_schulz_case(*shape: int) -> Case:
    """Compared with bfloat16 products, which is what `newton_schulz` and its plain form share."""
    from triptych_kernels import newton_schulz, newton_schulz_ref

    return Case(
        "newton_schulz",
        f"{shape}",
        HALF,
        [randn(*shape)],
        newton_schulz,
        newton_schulz_ref,
        differentiable=False,
        slack=2e-2,
    )


def newton_schulz_cases() -> Iterator[Case]:
    for shape in ((64, 64), (257, 130), (3, 512, 1536), (2, 1000, 200), (0, 64, 64)):
        yield newton_schulz_case(*shape)


def newton_schulz_timed() -> Iterator[Case]:
    yield newton_schulz_case(2048, 6144)
