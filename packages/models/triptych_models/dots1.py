"""dots.llm1 (text alone): Qwen3's attention, experts chosen by score + bias as in DeepSeek-V3."""

from pathlib import Path
from typing import Any, Self

from transformers import Dots1ForCausalLM

from .mixture import Mixture
from .qwen3 import Qwen3


class Dots1(Mixture, Qwen3):
    """Transformers' Dots1, fed with packed rows; its experts can be balanced by a bias."""

    hf_class = Dots1ForCausalLM
    model_type = "dots1"

    @classmethod
    def from_directory(cls, path: Path, **settings: Any) -> Self:
        """As every mixture's; also ValueError for experts that are chosen by groups."""
        model = super().from_directory(path, **settings)
        config = model.hf.config
        if config.n_group != 1:
            raise ValueError(
                f"{path / 'config.json'}: n_group must be 1, got {config.n_group}; "
                "experts chosen by groups are not supported"
            )
        return model
