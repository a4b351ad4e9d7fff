"""The model under ZeRO-3 on two ranks: `gather` really gathers and every rank keeps in step."""

from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from tests.models import tiny
from tests.ranks import run_ranks
from triptych_kernels import fuse
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.generate import generate
from triptych_models.packed import FUSED_OPS
from triptych_models.qwen3_vl import Qwen3VL

# Its build takes minutes and gloo does without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ZERO_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 1000,
        "stage3_prefetch_bucket_size": 1000,
    },
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
PAD_AND_STOP = {"pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}


def gather(parameters: list[torch.nn.Parameter]) -> deepspeed.zero.GatheredParameters:
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def build_sharded(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Qwen3VL:
    # by config: zero.Init's dtype argument is ignored where fp16 is not supported, as on the CPU
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}}
    with deepspeed.zero.Init(config_dict_or_path=ZERO_3 | precision):
        return build_model(config, dtype=dtype, gather=gather)


def assert_same_weights(sharded: Qwen3VL, plain: Qwen3VL) -> None:
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert p.numel() == 0, name
        with gather([p]):
            assert torch.equal(p, q), name


def build_and_round_trip(config: ModelConfig, out_dir: Path, dtype: torch.dtype) -> None:
    deepspeed.init_distributed("gloo")
    sharded, plain = build_sharded(config, dtype), build_model(config, dtype=dtype)
    assert_same_weights(sharded, plain)
    assert fuse(sharded.hf, dry_run=True, ops=FUSED_OPS) == fuse(
        plain.hf, dry_run=True, ops=FUSED_OPS
    ), "a partitioned model is fused in the same places"
    for (name, buffer), expected in zip(sharded.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    is_main = torch.distributed.get_rank() == 0
    export(sharded.hf, out_dir, config.path, dtype=dtype, gather=gather, is_main=is_main)
    torch.distributed.barrier()
    assert_same_weights(build_sharded(ModelConfig(path=out_dir), dtype), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_weights_equal_whole_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tiny.write_model_dir(tmp_path / "tiny", tied=True)
    config = ModelConfig(path=path, init="random", seed=1)
    run_ranks(build_and_round_trip, 2, config, tmp_path / "export", dtype)


def train_and_generate(config: ModelConfig) -> None:
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    sharded, plain = build_sharded(config), build_model(config, dtype=torch.float32)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=sharded, optimizer=optimizer, config=ZERO_3)
    text, image = tiny.document(1), tiny.document(2, grids=[(1, 4, 6)])
    batch = tiny.pack([text, image] if rank == 0 else [text], 64)

    for step in range(3):  # DeepSpeed records the module order, then prefetches by it
        loss = engine(**batch).loss_sum
        engine.backward(loss)
        plain.zero_grad()
        expected = plain(**batch).loss_sum
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            torch.distributed.all_reduce(q.grad)
            difference = (safe_get_full_grad(p) - q.grad / 2).norm()
            assert difference <= 1e-5 * q.grad.norm() + 1e-6, name
        engine.step()

        prompts = [[image, text], [text]][rank] if step < 2 else [[text], []][rank]
        new = {"max_new_tokens": 2 + rank, **PAD_AND_STOP}
        assert generate(sharded, prompts, synced=True, **new) == generate(plain, prompts, **new)


def test_ranks_with_and_without_images_train_and_generate_in_step(tmp_path: Path) -> None:
    path = tiny.write_model_dir(tmp_path / "tiny", tied=True)
    run_ranks(train_and_generate, 2, ModelConfig(path=path, init="random"))
