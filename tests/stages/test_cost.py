"""Ranks of one step get packs on which the model computes alike, whatever they show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import make_model_dir, sft_stage

RANKS, STEPS = 4, 16


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A model folder, and shards of which every second chat is images and the others text."""
    from triptych_data.shards.write import write_shards

    path = tmp_path_factory.mktemp("mixed")
    make_model_dir(path / "model")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(400):
        words = int(rng.integers(1, 6 if number % 2 else 60))
        content: list[dict] = [{"type": "text", "text": "What is it? " * words}]
        for image in range(int(rng.integers(1, 4)) * (number % 2)):
            name = f"{number}-{image}.png"
            height, width = (int(side) for side in rng.integers(32, 320, 2))
            Image.fromarray(np.full((height, width, 3), number % 255, np.uint8)).save(path / name)
            content.insert(0, {"type": "image", "image": name})
        answer = " ".join(map(str, range(int(rng.integers(1, 80)))))
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": turns}))
    (path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    write_shards(path / "chats.jsonl", path / "shards", samples_per_shard=100)
    return path


def imbalance(mixed: Path, *words: str, settled: bool) -> float:
    """Time of the first steps over that of ranks of equal load, if FLOPs were time."""
    import torch

    from triptych_core.config import load_config
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor
    from triptych_models.config import ModelConfig
    from triptych_models.pretend import build_pretend_model

    needed = [f"model.path={mixed / 'model'}", f"data.shards=[{mixed / 'shards'}]"]
    needed += ["data.seq_len=1024", "data.num_workers=0"]
    config = load_config(sft_stage().SftConfig, None, [*needed, *words])
    import planning  # beside it

    if settled:
        planning.settle_cost(config)
    model_config = ModelConfig(path=mixed / "model", freeze=config.model.freeze)
    flops = build_pretend_model(model_config, dtype=torch.float32).flops
    processor = Processor.from_directory(mixed / "model")
    ranks = [
        iter(PackLoader(config.data, processor, rank=rank, world_size=RANKS))
        for rank in range(RANKS)
    ]
    work = np.array([[flops(next(rank)) for rank in ranks] for _ in range(STEPS)])
    return work.max(1).sum() / work.mean(1).sum()


@pytest.mark.parametrize("freeze", ["[]", "[vision,language]"])
def test_what_a_model_computes_is_balanced_over_ranks(mixed, freeze):
    frozen = f"model.freeze={freeze}"
    at_random = imbalance(mixed, frozen, "data.balance_group=1", settled=False)
    tokens = imbalance(mixed, frozen, "data.cost.vision=0", settled=True)  # named: stays
    settled = imbalance(mixed, frozen, settled=True)
    print(f"{freeze}: at random {at_random:.4f}, by tokens {tokens:.4f}, settled {settled:.4f}")
    assert settled < 1.03
    assert settled - 1 < (min(at_random, tokens) - 1) / 2.5


def test_ratios_are_those_of_the_formulas():
    from triptych_models.pack_cost import pack_cost

    def flops(batch):
        lengths = np.diff(batch["cu_seqlens"])
        patches = [t * h * w for t, h, w in batch["image_grid_thw"]]
        language = sum(n * (n + 500) for n in lengths) + 70 * batch["num_targets"]
        return 3.0 * (language + 0.25 * sum(p * (p + 90) for p in patches))

    found = pack_cost(flops, images=True)
    assert found == {"linear": 500, "target": 70, "vision": 0.25, "vision_linear": 90}
