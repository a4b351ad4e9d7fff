"""Imports of every stage, once: forked ranks would each pay for them."""

import importlib
from importlib.util import find_spec

for name in (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # of each engine of bf16: 1.5 s
    "distutils.ccompiler",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "triptych_core.loop",
    "triptych_core.plan.plan",
    "triptych_core.run",
    "triptych_data.loader",
    "triptych_models.families",
    "triptych_models.pretend",
):
    importlib.import_module(name)
if find_spec("diffusers"):  # 3 s
    from diffusers import WanTransformer3DModel  # noqa: F401
    from diffusers.models.autoencoders import autoencoder_rae  # noqa: F401
