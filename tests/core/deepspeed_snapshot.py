"""What of DeepSpeed we rely on: its resolved configuration for ours, and names of its inside.

After a new version was admitted (CONTRIBUTING.md), written anew by

    python -m tests.core.deepspeed_snapshot
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
CASES = {
    "stage 1": ["engine.zero.stage=1"],
    "stage 2, fp32": ["engine.zero.stage=2", "engine.precision=fp32"],
    "stage 2, offload": ["engine.zero.stage=2", "engine.zero.offload_optimizer=true"],
    "stage 3": ["engine.zero.stage=3"],
    "stage 3, offload": ["engine.zero.stage=3", "engine.zero.offload_params=true"],
}
# What of a resolved configuration says nothing of numbers.
OTHER = {
    *("monitor_config", "flops_profiler_config", "comms_config", "nebula_config", "mesh_device"),
    *("autotuning_config", "aio_config", "_param_dict", "elasticity_enabled"),
}
# Module -> names that packages/core reads, calls or replaces, most of them not public.
NAMES = {
    "deepspeed.runtime.zero.stage3": [
        *("fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "averaged_gradients"),
        *("reduce_and_partition_stream", "_partition_all_parameters", "_global_grad_norm"),
        *("sub_group_to_group_id", "sub_group_process_groups", "dp_process_group", "clip_grad"),
        *("_pre_step", "_post_step", "checkpoint_event_prologue", "checkpoint_event_epilogue"),
        *("_reassign_or_swap_out_partitioned_parameters", "fp16_groups"),
        "ds_zero_placement_family",
    ],
    "deepspeed.runtime.zero.partition_parameters": ["ds_zero_partition_process_group"],
    "deepspeed.runtime.zero.stage_1_and_2": [
        *("single_partition_of_fp32_groups", "round_robin_bit16_groups", "reset_cpu_buffers"),
        *("real_dp_process_group", "round_robin_bit16_offsets", "averaged_gradients"),
        *("update_lp_params", "_global_grad_norm"),
    ],
    "deepspeed.runtime.bf16_optimizer": [
        *("fp32_groups_flat_partition", "bf16_groups", "real_dp_process_group"),
        *("update_lp_params", "_global_grad_norm"),
    ],
    "deepspeed.utils.groups": [
        *("_create_expert_and_data_parallel", "_get_expert_data_parallel_group_dict"),
        *("_get_expert_parallel_group_dict",),
    ],
    "deepspeed.runtime.engine": ["zero_prefetch_bucket_size", "is_gradient_accumulation_boundary"],
    "deepspeed.utils": ["set_z3_leaf_modules", "safe_get_full_grad", "safe_get_full_fp32_param"],
}


def snapshot() -> dict[str, Any]:
    """The version, what DeepSpeed resolves in every case, and which names there are.

    Of all cases but the first, only what differs from it.
    """
    import deepspeed

    cases = {case: resolved(words) for case, words in CASES.items()}
    first = cases[next(iter(CASES))]
    apart = {
        case: {k: v for k, v in values.items() if values is first or first.get(k, "absent") != v}
        for case, values in cases.items()
    }
    names = {module: names_in(module) for module in NAMES}
    return {"deepspeed": deepspeed.__version__, "resolved": apart, "names": names}


def resolved(words: list[str]) -> dict[str, Any]:
    """By dotted name: the configuration DeepSpeed makes of ours."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine.build import deepspeed_config

    config = load_config(StageConfig, None, words).engine
    made = DeepSpeedConfig(deepspeed_config(config, max_grad_norm=1.0))
    return dict(sorted(_flat({k: v for k, v in vars(made).items() if k not in OTHER}, "")))


def names_in(module: str) -> list[str]:
    """Of NAMES, those that stand in the module's text."""
    import importlib

    text = inspect.getsource(importlib.import_module(module))
    return [name for name in NAMES[module] if name in text]


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What changed, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = [(f"{where} {key}", old.get(key, "absent"), new.get(key, "absent")) for key in keys]
        return [line for name, a, b in pairs for line in differences(a, b, name)]
    return [] if old == new else [f"{where.strip()}: {old!r} became {new!r}"]


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return [x for k, v in value.items() for x in _flat(v, f"{name}.{k}" if name else str(k))]
    if not isinstance(value, str | int | float | bool | None):
        value = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(value).split()))
    return [(name, value)]


if __name__ == "__main__":
    FILE.write_text(json.dumps(snapshot(), indent=1) + "\n")
