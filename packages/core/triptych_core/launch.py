"""From a process to a rank: device, process group, seeds."""

from __future__ import annotations

import os
import random
import socket
import warnings
from dataclasses import dataclass

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from triptych_core.config import RunConfig


@dataclass(frozen=True)
class Runtime:
    """Who this process is in the job."""

    rank: int
    world_size: int
    on_cuda: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0


def launch(config: RunConfig) -> Runtime:
    """Join the process group (started by `deepspeed`, torchrun or plain python) and seed.

    CPU, CUDA and NPU take one path: DeepSpeed's accelerator names the device and the backend.
    """
    # DeepSpeed's collectives carry their old names in newer torch: nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    if config.device == "cpu" and accelerator.device_name() != "cpu":
        raise ValueError(
            f"run.device: must be set before deepspeed is imported, got {config.device} on "
            f"{accelerator.device_name()}; set DS_ACCELERATOR=cpu in the environment"
        )
    if accelerator.device_name() == "cpu":
        # The shared-memory collective is compiled at first use, for minutes, behind a lock file
        # that a killed build leaves behind for ever. Gloo's own is fast enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "gloo"
    else:
        accelerator.set_device(local_rank)
        avoid_cudnn_attention()
        backend = accelerator.communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    seed_everything(config.seed)
    return Runtime(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        on_cuda=accelerator.device_name() == "cuda",
    )


def avoid_cudnn_attention() -> None:
    """Let scaled_dot_product_attention run on torch's own kernels.

    The backward of cuDNN's is reported to read a workspace before it is written on Hopper, where
    lengths are no multiples of its tiles (TransformerEngine issue 2186, mended in 9.18), and to
    give NaN beyond it (pytorch issue 196678). Losses show nothing of it, and off costs no time.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def shutdown() -> None:
    """Wait for all ranks and leave the process group, so that nothing is torn down under a peer."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
