"""Mixtral (text alone): experts in every layer, of which each token takes two."""

from pathlib import Path
from typing import Any, Self

from transformers import MixtralForCausalLM

from .layout import StoredExperts
from .mixture import Mixture
from .qwen3 import Qwen3


class Mixtral(Mixture, Qwen3):
    """Transformers' Mixtral, fed with packed rows as Qwen3 is."""

    hf_class = MixtralForCausalLM
    model_type = "mixtral"
    stored = StoredExperts("block_sparse_moe", gate="w1", up="w3", down="w2")

    @classmethod
    def from_directory(cls, path: Path, **settings: Any) -> Self:
        """As every mixture's; also ValueError for a router that is to jitter in training."""
        model = super().from_directory(path, **settings)
        if noise := model.hf.config.router_jitter_noise:
            raise ValueError(
                f"{path / 'config.json'}: router_jitter_noise must be 0, got {noise}; "
                "what is computed again for a backward must be the same"
            )
        return model
