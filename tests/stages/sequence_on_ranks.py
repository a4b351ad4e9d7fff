"""Run by torchrun: layers of a shared row, compiled or not, against those of a whole row.

    torchrun --standalone --nproc_per_node=2 tests/stages/sequence_on_ranks.py FOLDER

Not in forked children, where torch.compile does not work. On GPUs it goes through NCCL. A tiny
model is made in FOLDER where there is none.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.models import tiny
from tests.models.tiny import document
from triptych_models.config import ModelConfig
from triptych_models.families import build_model
from triptych_models.sequence import SequenceGroup
from triptych_models.sequence_batch import take_part


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    world_size = dist.get_world_size()
    group = SequenceGroup(dist.group.WORLD.group_name, world_size, dist.get_rank())
    if group.rank == 0 and not folder.exists():
        tiny.write_model_dir(folder)
    dist.barrier()
    documents = [
        document(1, words=20),
        document(2, words=3, grids=[(1, 4, 6)]),
        document(3, words=4, grids=[(1, 8, 2), (1, 12, 4)]),
    ]
    batch = tiny.pack(documents, 128)
    settings = {"path": folder, "init": "random"}
    plain = build_model(ModelConfig(**settings), dtype=torch.float32).to(device)
    for compiled in ("none", "layers"):
        config = ModelConfig(**settings, compile=compiled)
        model = build_model(config, dtype=torch.float32, sequence=group).to(device).train()
        model.set_mlp_chunks(3)
        for way in ("none", "full", "offload"):
            model.set_checkpointing(way)
            for one, part in ((model, take_part(batch, group)), (plain, batch)):
                one.zero_grad()
                one(**on(device, part)).loss_sum.backward()
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                dist.all_reduce(p.grad)
                error = (p.grad - q.grad).norm().item()
                assert error <= 1e-5 * q.grad.norm().item() + 1e-6, (compiled, way, name, error)
    print(f"{world_size} ranks on {device.type}: as one")
    dist.destroy_process_group()


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.to(device) if isinstance(x, torch.Tensor) and name != "image_grid_thw" else x
        for name, x in batch.items()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
