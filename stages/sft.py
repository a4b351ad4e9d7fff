"""Supervised fine-tuning of a vision-language model on image-text chats.

Trains every part not named in `model.freeze` on the assistant's turns, from a local Hugging Face
directory or from random weights, on packed rows of `data.seq_len` tokens.

    deepspeed stages/sft.py --config stages/configs/sft_qwen3_vl_2b.yaml optim.lr=1e-5

Measured on: two CPU ranks (`make demo`) and one H100 (README, Results).
"""

import sys

from pydantic import Field

from triptych_core.config import Section, StageConfig, parse_args
from triptych_data.config import DataConfig
from triptych_models.config import ModelConfig


class EvaluationConfig(Section):
    """Held-out samples: their loss, and greedy answers compared with the expected ones."""

    shards: list[str] = Field(default_factory=list, description="held-out shards; empty = none")
    every: int = Field(0, ge=0, description="steps between evaluations; 0 = only before and after")
    max_new_tokens: int = Field(32, ge=1, description="longest answer, in tokens")
    batch_size: int = Field(32, ge=1, description="questions answered at once, per rank")
    max_questions: int = Field(2000, ge=0, description="how many questions to answer")
    num_examples: int = Field(48, ge=0, description="answers kept with images for the report")


class SftConfig(StageConfig):
    """Everything that makes a fine-tuning run."""

    model: ModelConfig
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    export: bool = Field(True, description="write run.dir/export, a Hugging Face directory")


def main(config: SftConfig) -> None:
    """Wire data, model and engine together and train."""
    # Not at the top: the configuration is checked before torch is imported.
    from triptych_core.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from triptych_core.engine import build_engine, compute_dtype, gather_parameters, sharded_init
    from triptych_core.launch import launch
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim import build_adamw, parameter_groups
    from triptych_core.report import write_report
    from triptych_core.run import close_run, open_run
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor
    from triptych_models.build import build_model
    from triptych_models.parts import count_parameters, part_of
    from triptych_models.weights import export
