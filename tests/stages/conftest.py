"""Imports of every stage, once: forked ranks would each pay for them."""

import importlib

for name in (
    "deepspeed",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "triptych_core.loop",
    "triptych_core.plan.plan",
    "triptych_data.loader",
    "triptych_models.families",
    "triptych_models.pretend",
):
    importlib.import_module(name)
