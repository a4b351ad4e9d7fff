"""The states of a rank's random generators: Python's, NumPy's, torch's and the device's."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from safetensors.torch import save

from triptych_core.launch import seed_everything


def dump_generators() -> bytes:
    """The states as a safetensors file."""
    tensors = {"torch": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        tensors["device"] = get_accelerator().get_rng_state()
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    scalars = {
        "numpy": [algorithm, int(position), int(has_gauss), float(cached)],
        "python": [version, gauss],
    }
    return save(tensors, metadata={"scalars": json.dumps(scalars)})


def load_generators(path: Path) -> None:
    """Restore the states that `dump_generators` put into a file."""
    with safe_open(path, "pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
    torch.set_rng_state(tensors["torch"])
    if "device" in tensors:
        get_accelerator().set_rng_state(tensors["device"])
    algorithm, position, has_gauss, cached = scalars["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((algorithm, keys, position, has_gauss, cached))
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed all as a function of run, step and rank: where other ranks had left their states."""
    words = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    seed_everything(int.from_bytes(words[:4], "little"))
