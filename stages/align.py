"""Alignment of a model that sees or hears: its projector trains, towers and language stay.

The first stage of a model whose parts have not met: of `tools/assemble_vlm.py`, or of any folder of
a family with a projector. On chats and documents with images or sound, usually captions. What is
frozen has neither gradients nor optimizer states, and towers run without a graph. The projector is
what takes a tower's features to the width of the language model, norms before it included: for
Qwen3-VL the merger and the DeepStack mergers, of what Qwen-Omni hears `ln_post` and `proj` (two of
them in Qwen3-Omni), for Aero the encoder's last norm and the linear. `stages/sft.py` goes on from
the export:

    python tools/assemble_vlm.py --vision VL --language LM --projector mlp --output runs/start
    deepspeed stages/align.py --config stages/configs/align_tiny.yaml model.path=runs/start
    deepspeed stages/sft.py --config my_sft.yaml model.path=runs/align_tiny/export

Measured on: two CPU ranks.
"""

import sys
from typing import Self

from planning import PackedConfig, plan, require_part
from pydantic import Field, model_validator
from wiring import run

from triptych_core.config import parse_args, run_main
from triptych_core.sections import OptimConfig
from triptych_models.catalogue import FAMILIES
from triptych_models.config import ModelConfig, Part

__all__ = ["AlignConfig", "main", "plan"]


class AlignModel(ModelConfig):
    """The model, of which all but the projector is frozen."""

    freeze: list[Part] = Field(
        default_factory=lambda: ["vision", "language"],
        description="all parts of the model but the projector; not to be changed here",
    )

    @model_validator(mode="after")
    def _settle_freeze(self) -> Self:
        if self.lora is not None:
            raise ValueError(
                "model.lora: must be left out in this stage, got adapters; its projector trains "
                "whole: train adapters with stages/sft.py"
            )
        if not self.path.is_dir():  # refused later
            return self
        rest = [part for part in FAMILIES[self.find_family()].parts if part != "projector"]
        if "freeze" in self.model_fields_set and {*self.freeze} != {*rest}:
            raise ValueError(
                f"model.freeze: must be [{', '.join(rest)}] in this stage, got {self.freeze}; "
                "leave it out, or train more parts with stages/sft.py"
            )
        self.freeze = rest
        return self


class AlignOptim(OptimConfig):
    """The optimizer at the rate of a fresh projector (LLaVA-1.5, arXiv 2310.03744, table 9)."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="on matrices; never on norms and biases")


class AlignConfig(PackedConfig):
    """Everything that makes a run of alignment."""

    model: AlignModel
    optim: AlignOptim = AlignOptim()


def main(config: AlignConfig) -> None:
    """Train the projector, evaluate, export."""
    require_part(
        config, "projector", "a model with a projector", "make one with tools/assemble_vlm.py"
    )
    run(config)


if __name__ == "__main__":
    run_main(main, parse_args(AlignConfig, sys.argv[1:], __doc__ or ""))
