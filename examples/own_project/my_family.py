"""A family of one's own: Mistral, text alone, as transformers ships it.

What every family says: its class in transformers, its `model_type`, how a packed row runs through
it, its parts, its FLOPs. Qwen3 says all of that for a plain decoder; a Mistral is one.
"""

from transformers import MistralForCausalLM

from triptych_models.catalogue import FAMILIES, Family
from triptych_models.qwen3 import Qwen3


class Mistral(Qwen3):
    """Transformers' Mistral without sliding windows, fed with packed rows."""

    hf_class = MistralForCausalLM
    model_type = "mistral"


FAMILIES["mistral"] = Family(
    "my_family:Mistral",
    parts=("language",),
    stages=("pretrain",),
    sizes="7B v0.3",
    ran="tiny on CPUs",
)
