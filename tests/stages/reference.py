"""A step as stock transformers and torch's AdamW take it: fp64, one process, document by document.

Nothing is packed, divided or accumulated. A row's gradients are those of its summed loss, and a
step's their sum over its rows divided by all their targets: so one backward pass a row is the
reference of every step of any rows. The routers' losses are written down once more from whole
softmaxes, over documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.stock import stock_logits, stock_twin
from tests.models.tiny import IMAGE, Document
from tests.stages.one_step import BETAS, BIAS_RATE, DECAY, EPS, LR, MAX_NORM, MOE, Part, Step
from tests.stages.rows import SEQ_LEN, build, documents, has_images, rows_of


class Row(NamedTuple):
    """Of one row: sums over its documents, and the gradients of its summed loss, fp64."""

    figures: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Reference:
    """What the model in a folder gives for each of `rows`, and steps made of that.

    `forced`: every token goes to expert 0 alone. `moe`: the weights of the routers' losses.
    `of_tokens`: that of the loss of tokens.
    """

    def __init__(
        self,
        folder: Path,
        forced: bool = False,
        moe: Mapping[str, Any] = MOE,
        of_tokens: float = 1.0,
    ) -> None:
        self.moe, self.of_tokens = moe, of_tokens
        model = build(folder)
        self.stock = stock_twin(model, torch.float64)
        self.weights = {f"hf.{n}": p.detach().clone() for n, p in self.stock.named_parameters()}
        routers = _routers(self.stock, forced)
        chosen = zip(documents(has_images(folder)), rows_of(folder), strict=True)
        self.rows = [self._row(model, row, batch, routers) for row, batch in chosen]

    def step(self, numbers: Sequence[int]) -> Step:
        """The first step of a run, on rows of these numbers."""
        chosen = [self.rows[number] for number in numbers]
        line: dict[str, Any] = {
            name: sum(row.figures[name] for row in chosen) for name in chosen[0].figures
        }
        divisor = max(1, int(line["num_targets"]))
        gradients = {
            name: sum(row.gradients[name] for row in chosen) / divisor for name in self.weights
        }
        line = {
            name: (value if name in COUNTS or value.dim() else value / divisor).tolist()
            for name, value in line.items()
        }
        line["packing_fill"] = line["num_tokens"] / (len(chosen) * SEQ_LEN)
        line["grad_norm"] = torch.stack([g.norm() for g in gradients.values()]).norm().item()
        masters = self._updated(gradients, line["grad_norm"])
        masters |= self._biases(line.get("expert_load", []))
        return Step(line, line["grad_norm"], _whole(gradients), _whole(masters))

    def _biases(self, loads: list[list[float]]) -> dict[str, Tensor]:
        """Where an expert had more than the mean of its layer its bias falls, else it rises."""
        buffers = dict(self.stock.named_buffers())
        names = [name for name in buffers if name.endswith("e_score_correction_bias")]
        moved = {}
        for name, load in zip(names, loads, strict=False):
            signs = [(x < sum(load) / len(load)) - (x > sum(load) / len(load)) for x in load]
            moved[f"hf.{name}"] = buffers[name] + BIAS_RATE * torch.tensor(signs)
        return moved

    def _row(
        self, model: Any, chosen: list[Document], batch: dict[str, Any], routers: list[Router]
    ) -> Row:
        figures = {
            "loss": torch.zeros((), dtype=torch.float64),
            "num_targets": torch.tensor(batch["num_targets"]),
            "num_tokens": torch.tensor(batch["num_tokens"]),
            "flops": torch.tensor(int(model.flops(batch))),
        }
        if routers:
            figures |= {name: torch.zeros(()).double() for name in ("balance_loss", "z_loss")}
            figures["expert_load"] = torch.zeros(len(routers), routers[0].num_experts)
            if "vision_config" in model.hf.config.to_dict():
                figures["expert_load_images"] = figures["expert_load"].clone()
        objective = figures["loss"]
        for document in chosen:
            targets = int((document.shift_labels != -100).sum())
            if not targets:
                continue
            logits = stock_logits(self.stock, model, document)
            loss = F.cross_entropy(logits, document.shift_labels, reduction="sum")
            objective = objective + self.of_tokens * loss
            for number, router in enumerate(routers):
                balance, z, load, load_images = router.figures(document, targets)
                objective = objective + self.moe["aux_loss"] * balance + self.moe["z_loss"] * z
                figures["balance_loss"] += balance.detach() / len(routers)
                figures["z_loss"] += z.detach() / len(routers)
                figures["expert_load"][number] += load
                if "expert_load_images" in figures:
                    figures["expert_load_images"][number] += load_images
        return self._differentiated(objective, figures)

    def _differentiated(self, objective: Tensor, figures: dict[str, Tensor]) -> Row:
        """The gradients of a row's summed loss."""
        figures["loss"] = objective.detach()
        found: Sequence[Tensor | None] = [None] * len(self.weights)
        if objective.requires_grad:
            parameters = list(self.stock.parameters())
            found = torch.autograd.grad(objective, parameters, allow_unused=True)
        return Row(
            figures,
            {
                name: torch.zeros_like(weight) if gradient is None else gradient
                for (name, weight), gradient in zip(self.weights.items(), found, strict=True)
            },
        )

    def _updated(self, gradients: dict[str, Tensor], norm: float) -> dict[str, Tensor]:
        masters = {name: weight.clone() for name, weight in self.weights.items()}
        scale = min(1.0, MAX_NORM / (norm + 1e-6))
        for name, master in masters.items():
            master.grad = gradients[name] * scale
        groups = [
            {"params": [m for m in masters.values() if (m.dim() >= 2) == decays], "weight_decay": w}
            for decays, w in ((True, DECAY), (False, 0.0))
        ]
        torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS).step()
        return masters


COUNTS = ("num_targets", "num_tokens", "flops")


class Router:
    """What a stock router said of the document that ran last."""

    def __init__(self, gate: Any, forced: bool) -> None:
        self.num_experts = gate.num_experts
        self.top_k = gate.top_k
        self.has_bias = hasattr(gate, "e_score_correction_bias")
        self.forced = forced
        gate.register_forward_hook(self._look)

    def _look(self, gate: Any, given: Any, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.logits, weights, experts = found  # (n, E), (n, k), (n, k)
        self.experts = torch.zeros_like(experts) if self.forced else experts
        return self.logits, weights, self.experts

    def figures(self, document: Document, targets: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Balance and z loss, and the load of all tokens and of those of images; (E,)."""
        probabilities = self.logits.softmax(-1)
        if self.has_bias:
            scores = self.logits.sigmoid()
            probabilities = scores / scores.sum(-1, keepdim=True)
        chosen = F.one_hot(self.experts, self.num_experts).sum(1)  # (n, E)
        shares = chosen.double().mean(0) / self.top_k
        balance = targets * self.num_experts * (shares * probabilities.mean(0)).sum()
        z = targets * self.logits.logsumexp(-1).square().mean()
        return balance, z, chosen.sum(0), chosen[document.input_ids == IMAGE].sum(0)


def _routers(stock: Any, forced: bool) -> list[Router]:
    gates = [m for name, m in stock.named_modules() if name.endswith("mlp.gate")]
    return [Router(gate, forced) for gate in gates]


def _whole(tensors: dict[str, Tensor]) -> dict[str, Part]:
    return {name: Part(tensor, None, 0, 1) for name, tensor in tensors.items()}
