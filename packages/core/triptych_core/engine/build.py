"""Our config in, an engine out, ours or DeepSpeed's. There is no second DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from triptych_core.config import EngineConfig, OptimConfig
from triptych_core.engine.cut_weights import edited_weights, whole_weights
from triptych_core.engine.lean_step import take_lean_steps
from triptych_core.engine.light import LightEngine
from triptych_core.optim.adamw import AdamW
from triptych_core.optim.muon import Muon
from triptych_core.optim.shards import find_shards, flat_masters
from triptych_core.parallel.tensor import WHOLE, TensorCuts, autotp_section, check_cut, read_cut

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compute_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype of weights and activations (masters and optimizer states are always fp32)."""
    return _DTYPES[config.precision]


def deepspeed_config(
    config: EngineConfig,
    max_grad_norm: float,
    world_size: int = 1,
    layer_numel: int = 0,
    tensor: TensorCuts = WHOLE,
) -> dict[str, Any]:
    """Derive DeepSpeed's own configuration; every value we rely on is written out.

    DeepSpeed's defaults have changed silently (clipping became 1.0, gradients accumulate in the
    model's dtype), so nothing that matters to the numbers is left to them. layer_numel is of the
    largest layer that ZeRO-3 gathers at once, 0 where it gathers module by module.
    """
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": config.reduce_dtype if config.precision == "bf16" else "fp32",
        "steps_per_print": 10**9,
        "zero_optimization": _zero_section(config, layer_numel),
        "data_types": {"grad_accum_dtype": "fp32"},
        **autotp_section(tensor),
    }
    if tensor.size == 1:  # else DeepSpeed checks it against all ranks here, its replicas there
        result["train_batch_size"] = config.gradient_accumulation_steps * world_size
    return result


def is_ours(config: EngineConfig, tensor_size: int = 1) -> bool:
    """Whether the engine is our own: of what is neither offloaded nor cut by tensor parallelism."""
    return not config.zero.offloads and tensor_size == 1


def sharded_init(
    config: EngineConfig, world_size: int, *, tensor_size: int = 1
) -> AbstractContextManager[Any]:
    """A context in which modules are born partitioned over ranks for DeepSpeed's ZeRO-3.

    Or as they are: on the host, where memory that nothing was written to takes none. Our ZeRO-3
    cuts parameters once `gather_parameters` has had them filled.
    """
    if config.stage != 3 or is_ours(config, tensor_size):
        return nullcontext()
    return deepspeed_init(config, world_size)


def deepspeed_init(config: EngineConfig, world_size: int) -> AbstractContextManager[Any]:
    """A context in which modules are born partitioned over ranks, for `deepspeed_engine`."""
    # No `dtype=`: on a device without fp16 DeepSpeed 0.19.8 ignores it and takes bf16 (an operator
    # precedence slip in zero.Init._set_dtype); the config's precision it does follow.
    return deepspeed.zero.Init(
        config_dict_or_path=deepspeed_config(config, max_grad_norm=0.0, world_size=world_size),
        # Torch's linear stays: DeepSpeed's own asks each weight for its number, with which
        # compiled layers would each be compiled anew.
        mem_efficient_linear=False,
    )


def gather_parameters(config: EngineConfig) -> Gather:
    """How to make parameters whole for a moment: rank 0's edits are what all ranks keep."""
    if config.stage != 3:
        return lambda parameters: nullcontext()

    def gather(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        if not is_ours(config) or _are_deepspeeds(parameters):
            return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
        return edited_weights(parameters, _device())

    return gather


def read_parameters(config: EngineConfig) -> Gather:
    """Like `gather_parameters`, for reading only: nothing is written back.

    What an engine has cut over ranks by tensor parallelism is put together, too.
    """
    if config.stage != 3:
        return read_cut(lambda parameters: nullcontext())

    def gather(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        if not is_ours(config) or _are_deepspeeds(parameters):
            return deepspeed.zero.GatheredParameters(parameters)
        return whole_weights(parameters)

    return read_cut(gather)


def build_engine(
    model: nn.Module,
    optimizer: AdamW,
    config: EngineConfig,
    optim: OptimConfig,
    world_size: int,
    layers: Sequence[nn.Module] = (),
    tensor: TensorCuts = WHOLE,
) -> Any:
    """Hand model and optimizer to our engine, or to DeepSpeed.

    What is offloaded, or cut by tensor parallelism, is DeepSpeed's. Under ZeRO-3 each of `layers`
    is gathered as a whole, one ahead.
    """
    if is_ours(config, tensor.size):
        return LightEngine(model, optimizer, config, optim.max_grad_norm, _device(), layers)
    return deepspeed_engine(model, optimizer, config, optim, world_size, layers, tensor)


def deepspeed_engine(
    model: nn.Module,
    optimizer: AdamW,
    config: EngineConfig,
    optim: OptimConfig,
    world_size: int,
    layers: Sequence[nn.Module] = (),
    tensor: TensorCuts = WHOLE,
) -> Any:
    """DeepSpeed's engine, with what is wrong or slow in it put right.

    ZeRO-3 gathers each of `layers` as a whole, one ahead: module by module the host cannot keep up
    with the device (Qwen3-1.7B at 16k tokens on an H100: 38.1 against 29.6 % MFU). The optimizer's
    groups keep their `name` and `peak_lr`; floating-point buffers keep their dtype (rotary
    frequencies in bf16 would move every position). Raises ValueError unless exactly what `tensor`
    names is cut over ranks.
    """
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers(remove_duplicate=False)}
    layer_numel = _make_leaves(model, layers) if config.stage == 3 else 0
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, optim.max_grad_norm, world_size, layer_numel, tensor),
    )
    check_cut(engine, tensor)
    if config.stage == 3 and not config.zero.offloads and tensor.size == 1:
        take_lean_steps(engine.optimizer)
    if config.stage in (1, 2) and config.zero.offload_optimizer:
        _drop_bad_gradients(engine.optimizer)
    if isinstance(optimizer, Muon):
        optimizer.place(find_shards(flat_masters(engine.optimizer), optimizer.shapes))
    for name, buffer in engine.module.named_buffers(remove_duplicate=False):
        assert buffer.dtype == buffers[name], f"{name}: became {buffer.dtype}, was {buffers[name]}"
    return engine


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def _are_deepspeeds(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether they were born partitioned, as for tensor parallelism or a benchmark."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def _drop_bad_gradients(zero: Any) -> None:
    """Have a step that is left out, because its gradients are no numbers, be the only one.

    DeepSpeed 0.19.8 keeps those gradients if the optimizer is offloaded, and adds all later ones to
    them: no step is taken any more.
    """
    reset = zero.reset_cpu_buffers

    def reset_and_drop() -> None:
        reset()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None

    zero.reset_cpu_buffers = reset_and_drop


def _make_leaves(model: nn.Module, layers: Sequence[nn.Module]) -> int:
    """Mark layers as ZeRO-3's leaf modules; -> elements of the largest."""
    if not layers:
        return 0
    set_z3_leaf_modules(model, sorted({type(layer) for layer in layers}, key=lambda t: t.__name__))
    sizes = (sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in layers)
    return int(max(sizes))


def _zero_section(config: EngineConfig, layer_numel: int) -> dict[str, Any]:
    zero, stage = config.zero, config.stage
    section: dict[str, Any] = {
        "stage": stage,
        # Layer by layer under ZeRO-3: what waits in a bucket is memory.
        "reduce_bucket_size": min(zero.bucket_size, layer_numel or zero.bucket_size),
        # ZeRO-3's bucket is one more copy of every gradient, which is copied to be reduced anyway.
        "contiguous_gradients": stage < 3,
        "overlap_comm": stage >= 2,
        "reduce_scatter": True,
    }
    if stage in (1, 2):
        section["allgather_bucket_size"] = zero.bucket_size
    if stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": layer_numel or zero.bucket_size // 10,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_max_live_parameters": zero.max_live,
            "stage3_max_reuse_distance": zero.max_live,
            "memory_efficient_linear": False,
        }
    pins = get_accelerator().device_name() != "cpu"
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": pins}
    if zero.offload_params:
        section["offload_param"] = {"device": "cpu", "pin_memory": pins}
    return section
