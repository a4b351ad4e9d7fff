"""Run by torchrun on two ranks: compiled layers of a shared row against plain ones of a whole row.

Not in forked children, where torch.compile does not work.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.models import tiny
from tests.models.tiny import document
from triptych_models.config import ModelConfig
from triptych_models.families import build_model
from triptych_models.sequence import SequenceGroup
from triptych_models.sequence_batch import take_part


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = SequenceGroup(dist.group.WORLD.group_name, 2, dist.get_rank())
    settings = {"path": folder, "init": "random"}
    plain = build_model(ModelConfig(**settings), dtype=torch.float32)
    compiled = build_model(
        ModelConfig(**settings, compile="layers"), dtype=torch.float32, sequence=group
    ).train()
    compiled.set_mlp_chunks(3)
    images = [[(1, 4, 6)], [(1, 8, 2), (1, 12, 4)]]
    documents = [
        document(1, words=20),
        *(document(n, words=3, grids=g) for n, g in enumerate(images)),
    ]
    batch = tiny.pack(documents, 128)
    for way in ("none", "full", "offload"):
        compiled.set_checkpointing(way)
        for model, part in ((compiled, take_part(batch, group)), (plain, batch)):
            model.zero_grad()
            model(**part).loss_sum.backward()
        for (name, p), q in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            dist.all_reduce(p.grad)
            assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm() + 1e-6, (way, name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
