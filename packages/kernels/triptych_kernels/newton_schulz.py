"""Newton-Schulz: the orthogonal factor U V^T of G = U S V^T, by matrix products alone.

X_0 = G / (s ||G||_F);  X_{t+1} = a_t X_t + b_t (X_t X_t^T) X_t + c_t (X_t X_t^T)^2 X_t

"quintic": a, b, c = 3.4445, -4.7750, 2.0315 and s = 1 (Keller Jordan's Muon,
kellerjordan.github.io/posts/muon). Five steps bring singular values of 0.002 ||G||_F and more to
0.68..1.21.
"polar_express": the coefficients of Polar Express (Amsel et al., arXiv 2505.16932) for 5 steps and
singular values down to 1e-3, with its safety factor 2e-2 in them and in s = 1.02, as Dion and
modded-nanogpt use them. They bring 0.001 ||G||_F and more to 0.84..1.15. Further steps are the
limit of that sequence, the classical (15/8, -5/4, 3/8), and converge to 1.

The Gram form (Dao et al., Gram Newton-Schulz, 2026) keeps R = X X^T and the factor Q with
X_t = Q X_0 instead of X_t: with Z = b R + c R^2,
  Q <- (a I + Z) Q,  R <- (a I + Z) R (a I + Z)
so that for G (M, N) with M < N the N-wide products are needed only at the start, at a restart
after 2 steps (X <- Q X, R <- X X^T, Q <- I, before rounding errors grow in R), and at the end.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import choose, is_traced

_Triple = tuple[float, float, float]

_QUINTIC: _Triple = (3.4445, -4.7750, 2.0315)
_CLASSICAL: _Triple = (15 / 8, -5 / 4, 3 / 8)
_POLAR_EXPRESS: tuple[_Triple, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# name -> its first steps, every further step, and the factor s on the norm.
COEFFICIENTS: dict[str, tuple[tuple[_Triple, ...], _Triple, float]] = {
    "polar_express": (_POLAR_EXPRESS, _CLASSICAL, 1.02),
    "quintic": ((), _QUINTIC, 1.0),
}
FORMS = ("auto", "standard", "gram")
_RESTART_AFTER = 2  # steps in the Gram form
# Wider than this, the Gram form has fewer multiplications even where the products of symmetric
# matrices are computed in full: 20 r + 10 against 8 r + 28 (times M^3) for N = r M and 5 steps.
_GRAM_FROM_RATIO = 1.5


@torch.no_grad()
def newton_schulz(
    g: Tensor,
    steps: int = 5,
    *,
    coefficients: str = "polar_express",
    form: str = "auto",
    compute_dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    backend: str | None = None,
) -> Tensor:
    """Replace the singular values of each matrix of `g` by values near 1; not differentiable.

    g: (..., M, N), floating, each matrix by itself; returns (..., M, N) in g's dtype. A matrix
    whose Frobenius norm is below `eps` comes out smaller, a zero one as zero. coefficients:
    "polar_express" or "quintic"; form: "standard", "gram", or "auto", which takes the Gram form
    where the longer side is more than 1.5 times the shorter. The norm is float32; the products are
    in `compute_dtype`, by default bfloat16, and float16 in the Gram form, which needs its digits.
    On CUDA, in half precision, products that are symmetric cost half.

    Raises ValueError for fewer than two dimensions, integers, and other names.
    """
    _check(g, steps, coefficients, form)
    if not g.numel():
        return torch.zeros_like(g)
    tall = g.shape[-2] > g.shape[-1]
    short, long = sorted(g.shape[-2:])
    gram = form == "gram" or (form == "auto" and long > _GRAM_FROM_RATIO * short)
    compute_dtype = compute_dtype or (torch.float16 if gram else torch.bfloat16)
    first, further, s = COEFFICIENTS[coefficients]
    triples = list(itertools.islice(itertools.chain(first, itertools.repeat(further)), steps))
    x = (g.mT if tall else g).reshape(-1, short, long)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_wide(g.dtype))
    x = torch.mul(
        x, (norm.clamp_min(eps) * s).reciprocal(), out=x.new_empty(x.shape, dtype=compute_dtype)
    )
    name = choose("newton_schulz", x, backend)
    with torch.autocast(x.device.type, enabled=False):  # compute_dtype is what was asked for
        x = _iterate_gram(x, triples, name) if gram else _iterate(x, triples, name)
    y = x.reshape(*g.shape[:-2], short, long)
    return (y.mT if tall else y).to(g.dtype)


def newton_schulz_ref(
    g: Tensor, steps: int = 5, *, coefficients: str = "polar_express", eps: float = 1e-7
) -> Tensor:
    """`newton_schulz` in plain torch and in g's own dtype: the formula, a matrix product each."""
    first, further, s = COEFFICIENTS[coefficients]
    x = g / (torch.linalg.matrix_norm(g, keepdim=True).clamp_min(eps) * s)
    for t in range(steps):
        a, b, c = first[t] if t < len(first) else further
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def _iterate(x: Tensor, triples: Sequence[_Triple], name: str) -> Tensor:
    """The standard form on x (B, M, N): three products a step, two of them symmetric."""
    for a, b, c in triples:
        z = _z(_gram(x, name), b, c, name)
        x = torch.baddbmm(x, z, x, beta=a)
    return x


def _iterate_gram(x: Tensor, triples: Sequence[_Triple], name: str) -> Tensor:
    """The Gram form on x (B, M, N)."""
    for begin in (0, _RESTART_AFTER):
        part = triples[begin : _RESTART_AFTER if begin == 0 else None]
        if part:
            x = torch.bmm(_gram_factor(_gram(x, name), part, name), x)
    return x


def _gram_factor(r: Tensor, triples: Sequence[_Triple], name: str) -> Tensor:
    """r (B, M, M) = X X^T -> the product Q (B, M, M) of all steps' factors a I + Z.

    All matrices here are polynomials in r, so every product of two of them is symmetric too.
    """
    q: Tensor | None = None
    for index, (a, b, c) in enumerate(triples):
        z = _z(r, b, c, name)
        if index < len(triples) - 1:
            rz = _symmetric_product(z, r, name, plus=r, beta=a)
            r = _symmetric_product(z, rz, name, plus=rz, beta=a)
        if q is None:
            q = z
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = _symmetric_product(z, q, name, plus=q, beta=a)
    assert q is not None
    return q


def _z(r: Tensor, b: float, c: float, name: str) -> Tensor:
    """b r + c r r for symmetric r (B, M, M)."""
    return _symmetric_product(r, r, name, alpha=c, plus=r, beta=b)


def _gram(x: Tensor, name: str) -> Tensor:
    """x x^T: (B, M, N) -> (B, M, M)."""
    return _launch(x, x, None, 1.0, 0.0) if name == "triton" else torch.bmm(x, x.mT)


def _symmetric_product(
    x: Tensor, y: Tensor, name: str, *, plus: Tensor, alpha: float = 1.0, beta: float
) -> Tensor:
    """alpha x y + beta plus, all (B, M, M) and symmetric, the result too."""
    if name == "triton":
        return _launch(x, y, plus, alpha, beta)
    # y, and not its transpose that the kernel reads: cuBLAS leaves it a little asymmetric, and each
    # transposition would turn that around and make it grow.
    return torch.baddbmm(plus, x, y, beta=beta, alpha=alpha)


def _launch(x: Tensor, y: Tensor, plus: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha x y^T + beta plus by the kernel, which computes one half and mirrors it."""
    if is_traced(x):
        return _symmetric_product_op(x, y, plus, alpha, beta)
    from .triton_ops import newton_schulz as kernels

    return kernels.symmetric_product(x, y, plus, alpha, beta)


@torch.library.custom_op("triptych::symmetric_product", mutates_args=())
def _symmetric_product_op(
    x: Tensor, y: Tensor, plus: Tensor | None, alpha: float, beta: float
) -> Tensor:
    from .triton_ops import newton_schulz as kernels

    return kernels.symmetric_product(x, y, plus, alpha, beta)


@_symmetric_product_op.register_fake
def _(x: Tensor, y: Tensor, plus: Tensor | None, alpha: float, beta: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(g: Tensor, steps: int, coefficients: str, form: str) -> None:
    if g.dim() < 2 or not g.is_floating_point():
        raise ValueError(
            f"newton_schulz: g must be matrices (..., M, N) of a floating dtype, got "
            f"{tuple(g.shape)} {g.dtype}; flatten or convert it first"
        )
    if steps < 1:
        raise ValueError(f"newton_schulz: steps must be at least 1, got {steps}; use 5")
    for what, value, known in (
        ("coefficients", coefficients, COEFFICIENTS),
        ("form", form, FORMS),
    ):
        if value not in known:
            raise ValueError(
                f"newton_schulz: {what} must be one of {', '.join(known)}, got {value!r}; "
                f"name one of these"
            )
