"""Pretraining of a language or vision-language model on documents, chats with images, or both.

Every token of a document but the first is a target, except those of media in it; of a chat, the
assistant's turns. Plain documents longer than `data.seq_len` are cut into pieces of it. From random
weights (`model.init=random`) or continued from a Hugging Face directory. The learning rate stays
where it is after warm-up and falls only in the last `schedule.decay_steps` (WSD), so that a run
without them can be gone on from. Held-out shards are scored by their loss alone. `model.lora`
trains adapters instead, as in stages/sft.py.

    triptych-data shard documents.jsonl shards/
    deepspeed stages/pretrain.py --config stages/configs/pretrain_tiny.yaml data.shards=[shards]

Text and images are mixed by `data.sources`, each with its share:

    data.sources.text.shards=[web] data.sources.text.weight=3 \\
    data.sources.captions.shards=[pairs] data.sources.captions.weight=1

Measured on: two CPU ranks.
"""

import sys
from typing import Literal

from planning import PackedConfig, plan
from pydantic import Field
from wiring import run

from triptych_core.config import parse_args, run_main
from triptych_core.sections import EvaluationConfig, OptimConfig, ScheduleConfig

__all__ = ["PretrainConfig", "main", "plan"]


class PretrainOptim(OptimConfig):
    """The optimizer, with the rate and the decay of a model that begins from nothing."""

    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; never on norms and biases")


class PretrainSchedule(ScheduleConfig):
    """Warm-up, stable, decay."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = Field("wsd", description="shape")


class PretrainEvaluation(EvaluationConfig):
    """Held-out loss; a model that has seen no chats is not asked."""

    max_questions: int = Field(0, ge=0, description="how many questions to answer; 0 = none")


class PretrainConfig(PackedConfig):
    """Everything that makes a pretraining run."""

    optim: PretrainOptim = PretrainOptim()
    schedule: PretrainSchedule = PretrainSchedule()
    evaluation: PretrainEvaluation = PretrainEvaluation()


def main(config: PretrainConfig) -> None:
    """Pretrain, score held-out shards, export."""
    run(config)


if __name__ == "__main__":
    run_main(main, parse_args(PretrainConfig, sys.argv[1:], __doc__ or ""))
