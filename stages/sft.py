"""Supervised fine-tuning of a language or vision-language model on chats.

Trains every part not named in `model.freeze` on the assistant's turns, from a local Hugging Face
directory or from random weights, on packed rows of `data.seq_len` tokens. Held-out chats are also
asked: greedy answers are compared with the expected ones.

    deepspeed stages/sft.py --config stages/configs/sft_qwen3_vl_2b.yaml optim.lr=1e-5

With `model.lora` adapters train instead (LoRA, or DoRA, through peft; all else is frozen): run.dir
gets `adapter`, which stock peft loads on `model.path`, and `export` with them merged. With
`model.lora.quantize=nf4` the weights beside them lie in four bits (QLoRA).

    deepspeed stages/sft.py --config stages/configs/sft_qwen3_vl_2b.yaml model.lora.rank=16

Measured on: two CPU ranks (`make demo`) and one H100 (README, Results).
"""

import sys

from planning import PackedConfig, plan
from wiring import run

from triptych_core.config import parse_args, run_main

__all__ = ["SftConfig", "main", "plan"]


class SftConfig(PackedConfig):
    """Everything that makes a fine-tuning run."""


def main(config: SftConfig) -> None:
    """Fine-tune, evaluate, export."""
    run(config)


if __name__ == "__main__":
    run_main(main, parse_args(SftConfig, sys.argv[1:], __doc__ or ""))
