"""Training of a mixture of experts on chats or documents, its experts divided over ranks if wanted.

From a Hugging Face directory of a mixture, published or made of a dense one by
`tools/upcycle_moe.py`. Experts are kept even by the losses of `model.moe`, or of a mixture with
biases (`--shared-expert` makes one) by `model.moe.bias_rate`; with
`model.freeze=[language]` only experts and routers train. metrics.jsonl has each sparse layer's
`balance_loss` (1 when even), `z_loss` and, once an interval, `expert_load`, the tokens of every
expert of every sparse layer, of text and images apart, with entropy and largest share.

    python tools/upcycle_moe.py runs/pretrain_tiny/export runs/moe_tiny/start --experts 4 --top-k 2
    deepspeed stages/moe.py --config stages/configs/moe_tiny.yaml parallel.expert=2

Measured on: two CPU ranks.
"""

import sys
from typing import Self

from planning import PackedConfig, plan, require_part
from pydantic import Field, model_validator
from wiring import run

from triptych_core.config import parse_args, run_main
from triptych_core.sections import OptimConfig
from triptych_models.config import MoEConfig

__all__ = ["MoEStageConfig", "main", "plan"]


class MoEOptim(OptimConfig):
    """The optimizer, with the rate at which copies of a trained MLP part (arXiv 2401.15947)."""

    lr: float = Field(2e-5, gt=0, description="peak learning rate")


class MoEStageConfig(PackedConfig):
    """Everything that makes a run of a mixture of experts."""

    optim: MoEOptim = MoEOptim()

    @model_validator(mode="after")
    def _set_losses(self) -> Self:
        if self.model.moe is None:
            self.model.moe = MoEConfig()
        return self


def main(config: MoEStageConfig) -> None:
    """Train routers, experts and the rest, evaluate, export."""
    require_part(
        config, "experts", "a mixture of experts", "make one of it with tools/upcycle_moe.py"
    )
    run(config)


if __name__ == "__main__":
    run_main(main, parse_args(MoEStageConfig, sys.argv[1:], __doc__ or ""))
