"""AdamW over fp32 masters: gradients of any float dtype, one launch a group, no wait for the host.

The update is `triptych_kernels.adamw_`'s (Loshchilov and Hutter, arXiv 1711.05101); where all is
fp32 and on the CPU, torch's own fused one. torch.optim.AdamW takes no gradient of another dtype
than its parameter's, writes no low-precision weights and keeps states in fp32 only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from triptych_core.optim.ema import COUNT, Ema
from triptych_kernels import adamw_

StateDtype = Literal["fp32", "bf16"]
STATE_DTYPES: dict[StateDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STEP, _MOMENTS = "step", ("exp_avg", "exp_avg_sq")

Gradients = Mapping[Tensor, Tensor]  # by master
# Given an update's scale, or None, the scale to use: NaN leaves everything as it is.
Ask = Callable[[Tensor | None], Tensor]


class AdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) on masters that are whole parameters or ZeRO's flat shards.

    A master's state is `step`, an int, so that reading it waits for nothing, `exp_avg` and
    `exp_avg_sq`, of the master's shape. DeepSpeed may show the groups one by one, with one master
    in each.

    Args:
        groups: parameter groups.
        lr, betas, eps: of groups that do not say.
        state_dtype: fp32, or bf16: then states are rounded stochastically, without bias.
        seed: of that rounding, which is a function of it, the group's name and the step: a resumed
            run repeats it. It must be the same on ranks that hold the same masters.
        ema: keep an average of each master in its state, too.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        state_dtype: StateDtype = "fp32",
        seed: int = 0,
        ema: Ema | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.01}
        super().__init__(groups, defaults)
        self._state_dtype = STATE_DTYPES[state_dtype]
        self._seed = seed
        self._ema = ema
        self._copies: dict[Tensor, Tensor] = {}
        self.ask: Ask | None = None  # before each update

    def attach(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Have `step` write each master's new value into its bf16 working copy too."""
        self._copies.update(copies)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gradients: Gradients | None = None,
        grad_scale: Tensor | None = None,
        own_scales: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Update the masters that have a gradient in all groups that are in `param_groups` now.

        Groups that rest (`groups.set_learning_rate`) stay as they are and count no step.

        Args:
            closure: computes the loss, which is returned.
            gradients: by master, fp32 or bf16; a master that is not in it has its `grad`.
            grad_scale: () fp32 on the masters' device, multiplied into gradients.
            own_scales: further such of the groups with a `clip`, by that; beside `grad_scale`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.ask is not None:
            grad_scale = self.ask(grad_scale)
        for group in self.param_groups:
            if group.get("rests", False):
                continue
            if self._ema is not None:
                self._ema.begin(self.state, group["params"])
            own = (own_scales or {}).get(group.get("clip", ""))
            scale = grad_scale if own is None or grad_scale is None else own * grad_scale
            self._step_group(group, gradients or {}, scale)
            if self._ema is not None:
                self._ema.follow(self.state, group["params"], grad_scale)
        return loss

    def forget_step(self) -> None:
        """Count the last update, which the device left out, no longer."""
        for state in self.state.values():
            for name in (_STEP, COUNT):
                if name in state:
                    state[name] = int(state[name]) - 1

    def _step_group(
        self, group: dict[str, Any], gradients: Gradients, grad_scale: Tensor | None
    ) -> None:
        by_step: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for master in group["params"]:
            gradient = gradients.get(master, master.grad)
            if gradient is not None:
                by_step.setdefault(self._begin(master), []).append((master, gradient))
        beta1, beta2 = group["betas"]
        for step, pairs in by_step.items():
            masters = [master for master, _ in pairs]
            copies = [self._copies.get(master) for master in masters] if self._copies else None
            adamw_(
                masters,
                [gradient for _, gradient in pairs],
                *([self.state[master][name] for master in masters] for name in _MOMENTS),
                copies=copies,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=step,
                grad_scale=grad_scale,
                seed=zlib.crc32(f"{self._seed} {group.get('name')} {step}".encode()),
            )

    def _begin(self, master: Tensor) -> int:
        """The number of this step of a master, whose states are there from now on."""
        state = self.state[master]
        if _STEP not in state:
            state[_STEP] = 0
            for name in _MOMENTS:
                state[name] = torch.zeros_like(
                    master, dtype=self._state_dtype, memory_format=torch.contiguous_format
                )
        # Loading makes states of their master's dtype, and torch's AdamW counts in a tensor.
        for name in _MOMENTS:
            state[name] = state[name].to(self._state_dtype)
        state[_STEP] = int(state[_STEP]) + 1
        return int(state[_STEP])
