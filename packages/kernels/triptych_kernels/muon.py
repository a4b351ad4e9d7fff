"""Muon: momentum whose matrices are made orthogonal, with AdamW for everything else.

B <- mu B + (1 - mu) G;  U = newton_schulz((1 - mu) G + mu B);  W <- (1 - lr wd) W - lr s U

Keller Jordan's Muon (kellerjordan.github.io/posts/muon), with the weight decay and the scale s of
Moonlight (Liu et al., arXiv 2502.16982); the update rule is that of torch.optim.Muon.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .newton_schulz import COEFFICIENTS, FORMS, newton_schulz

# The factor on lr for a matrix (M, N).
_ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
}
_NAMES: dict[str, Collection[str]] = {
    "coefficients": COEFFICIENTS,
    "form": FORMS,
    "adjust_lr": _ADJUSTMENTS,
}
_BATCH_ELEMENTS = 1 << 27  # of one newton_schulz call: 256 MiB in half precision


class Muon(torch.optim.Optimizer):
    """Muon for the matrices and AdamW for the rest, in one optimizer on one GPU.

    params: tensors, or groups (dicts) of them. A group with use_muon=True (the default) takes
    parameters (M, N), or with stacked=True also (E, M, N), each a stack of E matrices, such as the
    experts of a layer; a group with use_muon=False takes any shape and is stepped by AdamW. Every
    keyword is the default of all groups and may be set per group: lr, weight_decay (decoupled,
    times lr) and use_muon for both kinds; momentum, nesterov, steps, coefficients, form,
    compute_dtype (see `newton_schulz`), adjust_lr and stacked for Muon; betas and eps for AdamW.

    adjust_lr scales lr for a matrix (M, N): "original" by sqrt(max(1, M/N)); "match_rms_adamw" by
    0.2 sqrt(max(M, N)), which gives updates the size of AdamW's, so that AdamW's lr and
    weight_decay can be kept. Momentum has the dtype of its parameter. Parameters of one shape are
    orthogonalised in one batch, which takes room for at most 2^27 elements, or one parameter.

    Embeddings and the output layer belong into a use_muon=False group although they are matrices.
    Sharded parameters (ZeRO, FSDP) are not handled: a slice of a matrix is not that matrix.

    Raises ValueError for values out of range, unknown names, and Muon groups with parameters that
    are not matrices.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        use_muon: bool = True,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        coefficients: str = "polar_express",
        form: str = "auto",
        compute_dtype: torch.dtype | None = None,
        adjust_lr: str = "original",
        stacked: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "use_muon": use_muon,
            "momentum": momentum,
            "nesterov": nesterov,
            "steps": steps,
            "coefficients": coefficients,
            "form": form,
            "compute_dtype": compute_dtype,
            "adjust_lr": adjust_lr,
            "stacked": stacked,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], f"Muon: param_groups[{len(self.param_groups) - 1}]")
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["use_muon"]:
                self._step_muon(params, group)
            else:
                self._step_adamw(params, group)
        return loss

    def _step_muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [_gradient(p) for p in params]
        buffers = [self._momentum_buffer(p) for p in params]
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for indices in _batches(params):
            shape = params[indices[0]].shape
            orthogonal = newton_schulz(
                torch.stack([updates[i] for i in indices]),
                group["steps"],
                coefficients=group["coefficients"],
                form=group["form"],
                compute_dtype=group["compute_dtype"],
            )
            scale = _ADJUSTMENTS[group["adjust_lr"]](shape[-2], shape[-1])
            torch._foreach_add_(
                [params[i] for i in indices], list(orthogonal.unbind()), alpha=-group["lr"] * scale
            )

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [_gradient(p) for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def _batches(params: list[Tensor]) -> Iterator[list[int]]:
    """Indices of parameters of one shape, dtype and device, in batches that fit the memory."""
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for index, p in enumerate(params):
        alike.setdefault((p.shape, p.dtype, p.device), []).append(index)
    for (shape, _, _), indices in alike.items():
        size = max(1, _BATCH_ELEMENTS // max(1, shape.numel()))
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise ValueError(
            f"Muon: a gradient must be dense, got a sparse one of {tuple(p.shape)}; build its "
            f"embedding with sparse=False"
        )
    return p.grad


def _check_group(group: dict[str, Any], where: str) -> None:
    """Refuse values out of range; of the options of the other kind of group nothing is asked."""
    _require(group["lr"] >= 0, f"{where}.lr", "be at least 0", group["lr"])
    _require(
        group["weight_decay"] >= 0, f"{where}.weight_decay", "be at least 0", group["weight_decay"]
    )
    if not group["use_muon"]:
        inside = all(0 <= beta < 1 for beta in group["betas"])
        _require(inside, f"{where}.betas", "lie in 0..1, without 1", group["betas"])
        _require(group["eps"] >= 0, f"{where}.eps", "be at least 0", group["eps"])
        return
    momentum = group["momentum"]
    _require(0 <= momentum < 1, f"{where}.momentum", "lie in 0..1, without 1", momentum)
    _require(group["steps"] >= 1, f"{where}.steps", "be at least 1", group["steps"])
    for option, known in _NAMES.items():
        value = group[option]
        _require(value in known, f"{where}.{option}", f"be one of {', '.join(known)}", value)
    allowed = (2, 3) if group["stacked"] else (2,)
    names = group.get("param_names", [None] * len(group["params"]))
    for index, (p, name) in enumerate(zip(group["params"], names, strict=True)):
        if p.dim() not in allowed or not p.is_floating_point():
            raise ValueError(
                f"{where}.params[{index}]{f' ({name})' if name else ''}: must be a real matrix "
                f"(M, N), got {tuple(p.shape)} {p.dtype}; put it into a group with use_muon=False "
                f"(AdamW), or set stacked=True if it is (E, M, N), a stack of matrices"
            )


def _require(holds: bool, where: str, what: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{where}: must {what}, got {value!r}; correct it")
