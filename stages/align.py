"""Alignment of a vision-language model: its projector trains, the tower and the language stay.

The first stage of a model whose parts have not met: of `tools/assemble_vlm.py`, or of any
Qwen3-VL folder. On chats and documents with images, usually captions. What is frozen has neither
gradients nor optimizer states, and the tower runs without a graph. For Qwen3-VL the projector is
the merger and the DeepStack mergers. `stages/sft.py` goes on from the export:

    python tools/assemble_vlm.py --vision VL --language LM --projector mlp --output runs/start
    deepspeed stages/align.py --config stages/configs/align_tiny.yaml model.path=runs/start
    deepspeed stages/sft.py --config my_sft.yaml model.path=runs/align_tiny/export

Measured on: two CPU ranks.
"""

import sys
from typing import Self

from pydantic import Field, model_validator
from wiring import PackedConfig, plan, require_part, run

from triptych_core.config import parse_args, run_main
from triptych_core.sections import OptimConfig
from triptych_models.config import ModelConfig, Part

__all__ = ["AlignConfig", "main", "plan"]


class AlignModel(ModelConfig):
    """The model, of which all but the projector is frozen."""

    freeze: list[Part] = Field(
        default_factory=lambda: ["vision", "language"],
        description="all parts but the projector; not to be changed here",
    )


class AlignOptim(OptimConfig):
    """The optimizer at the rate of a fresh projector (LLaVA-1.5, arXiv 2310.03744, table 9)."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="on matrices; never on norms and biases")


class AlignConfig(PackedConfig):
    """Everything that makes a run of alignment."""

    model: AlignModel
    optim: AlignOptim = AlignOptim()

    @model_validator(mode="after")
    def _check_freeze(self) -> Self:
        if set(self.model.freeze) != {"vision", "language"}:
            raise ValueError(
                "model.freeze: must be [vision, language] in this stage, got "
                f"{self.model.freeze}; leave it out, or train more parts with stages/sft.py"
            )
        return self


def main(config: AlignConfig) -> None:
    """Train the projector, evaluate, export."""
    require_part(
        config, "projector", "a model with a projector", "make one with tools/assemble_vlm.py"
    )
    run(config)


if __name__ == "__main__":
    run_main(main, parse_args(AlignConfig, sys.argv[1:], __doc__ or ""))
