"""Every kind of input gives the same tensors; what does not fit or is broken is named."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.models import tiny
from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards, sft_stage
from tests.tools.average_folders import (
    CONFIG,
    assert_same,
    average,
    read,
    read_weights,
    weights,
    write_folder,
)
from triptych_core.averaging.request import Request, make_job
from triptych_core.averaging.sources import open_source
from triptych_core.averaging.verify import verify_output
from triptych_core.checkpoint.folders import make_room, unfinished_folder
from triptych_core.checkpoint.fragments import _share
from triptych_core.checkpoint.payload import FROZEN, MASTER, Stretch
from triptych_core.checkpoint.save import Snapshot, finish, write_share
from triptych_models.config import ModelConfig
from triptych_models.expert_weights import router_biases
from triptych_models.export import export
from triptych_models.families import build_model

LARGE, SMALL = "model.embed.weight", "model.layers.0.norm.weight"


def write_index(path: Path, files: dict[str, list[str]], name: str) -> None:
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    (path / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(path: Path, tensors: dict[str, Tensor]) -> Path:
    """The folder's single file as two."""
    (path / "model.safetensors").unlink()
    names = list(tensors)
    files = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, path / file)
    write_index(path, files, "model.safetensors.index.json")
    return path


def as_bin(path: Path, content: Any) -> Path:
    (path / "model.safetensors").unlink()
    torch.save(content, path / "pytorch_model.bin")
    return path


def own_checkpoint(run_dir: Path, step: int, tensors: dict[str, Tensor], writers: int) -> Path:
    """What `writers` ranks save of a model, the first tensor frozen."""
    folder = unfinished_folder(run_dir, step)
    make_room(folder, 1)
    kinds = {name: FROZEN if n == 0 else MASTER for n, name in enumerate(tensors)}
    held = [Stretch(f"hf.{n}", kinds[n], 0, t.reshape(-1)) for n, t in tensors.items()]
    held += [Stretch(f"hf.{n}", "exp_avg", 0, t.reshape(-1) * 9) for n, t in tensors.items()]
    shapes = {f"hf.{name}": str(tuple(tensor.shape)) for name, tensor in tensors.items()}
    state = {
        "step": step,
        "parallel.tensor": 1,
        "trainable_parameters": dict(list(shapes.items())[1:]),
        "frozen_parameters": dict(list(shapes.items())[:1]),
        "buffers": {},
    }
    records = {}
    for rank in range(writers):
        snapshot = Snapshot(folder, rank, _share(held, rank, writers), {}, b"", state, 9)
        records |= write_share(snapshot)
    return finish(snapshot, records)


def without_empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def test_sharded_folders(tmp_path):
    tensors = weights(1, torch.bfloat16)
    path = shard(write_folder(tmp_path / "checkpoint-40", tensors), tensors)
    source = open_source(path)
    assert_same(read(source), tensors)
    assert source.step == 40
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 44}))
    assert open_source(path).step == 44


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bin_files_are_read_in_place(tmp_path, dtype):
    tensors = weights(1, dtype)
    tied = {**tensors, "lm_head.weight": tensors[LARGE]}  # as transformers 4 saved it
    path = as_bin(write_folder(tmp_path / "bin", tensors), tied)
    assert_same(read(open_source(path)), tensors)
    part = torch.arange(24, dtype=dtype).reshape(6, 4)
    torch.save({"part": part[2:5]}, path / "pytorch_model.bin")
    assert_same(read(open_source(path)), {"part": part[2:5]})
    torch.save({"part": part.T}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"part must have its elements in a row"):
        open_source(path)
    names = list(tensors)
    files = {"x.bin": names[:1], "y.bin": names[1:]}
    for file, some in files.items():
        torch.save({name: tensors[name] for name in some}, path / file)
    write_index(path, files, "pytorch_model.bin.index.json")
    assert_same(read(open_source(path)), tensors)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/average-was-here",)


def test_a_bin_file_runs_nothing(tmp_path):
    path = as_bin(write_folder(tmp_path / "bin", {}), {"weight": torch.ones(1), "x": Evil()})
    with pytest.raises(ValueError, match=r"pytorch_model.bin: must hold tensors and plain values"):
        open_source(path)
    assert not Path("/tmp/average-was-here").exists()
    (path / "pytorch_model.bin").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: must be a whole zip archive"):
        open_source(path)


@pytest.mark.parametrize("writers", [1, 3, 17])
def test_checkpoints_of_any_number_of_ranks(tmp_path, writers):
    tensors = without_empty(weights(1, torch.float32))
    like = write_folder(tmp_path / "like", tensors)
    path = own_checkpoint(tmp_path / "run", 5, tensors, writers)
    source = open_source(path, like)
    assert_same(read(source), tensors)
    assert source.step == 5
    other = without_empty(weights(2, torch.float32))
    own_checkpoint(tmp_path / "run", 9, other, 2)
    found = average(tmp_path / "out", tmp_path / "run", like=like)  # a run is its checkpoints
    assert_same(found, {name: (tensors[name] + other[name]) / 2 for name in tensors})
    verify_output(tmp_path / "out")


def test_what_two_ranks_wrote_is_read_once_and_a_gap_is_found(tmp_path):
    values = torch.arange(10.0)
    like = write_folder(tmp_path / "like", {"x": values})
    for begin, message in ((3, None), (6, r"x must be whole .* up to 5 of \(10,\)")):
        folder = unfinished_folder(tmp_path, begin)
        make_room(folder, 1)
        state = {"step": begin, "trainable_parameters": {"x": "(10,)"}}
        state |= {"frozen_parameters": {}, "buffers": {}}
        parts = [values[:5], values[begin:]]
        records = {}
        for rank, part in enumerate(parts):
            mine = [Stretch("x", MASTER, begin * rank, part)]
            records |= write_share(Snapshot(folder, rank, mine, {}, b"", state, 9))
        path = finish(Snapshot(folder, 0, [], {}, b"", state, 9), records)
        if message is None:
            assert_same(read(open_source(path, like)), {"x": values})
        else:
            with pytest.raises(ValueError, match=message):
                open_source(path, like)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "dots1"])
def test_experts_have_the_names_of_an_export(tmp_path, family):
    model_folder = getattr(tiny, f"write_{family}_model_dir")(tmp_path / "model")
    config = ModelConfig(path=model_folder, init="random")
    hf = build_model(config, dtype=torch.float32).hf
    export(hf, tmp_path / "export", model_folder, dtype=torch.float32)
    held = {n: t.detach() for n, t in (*hf.named_parameters(), *router_biases(hf).items())}
    path = own_checkpoint(tmp_path / "run", 5, held, 3)
    wanted = read_weights(tmp_path / "export")
    for like in (model_folder, tmp_path / "export"):
        assert_same(read(open_source(path, like)), wanted)
    mixed = average(tmp_path / "out", tmp_path / "export", path, like=tmp_path / "export")
    assert_same(mixed, wanted)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    tensors = without_empty(weights(1, torch.float32))
    like = write_folder(tmp_path / "like", tensors)
    path = own_checkpoint(tmp_path / "run", 5, tensors, 2)
    payload = path / "rank-00001.safetensors"
    data = bytearray(payload.read_bytes())
    data[-5] ^= 1
    payload.write_bytes(data)
    open_source(path, like)
    with pytest.raises(ValueError, match=r"rank-00001.safetensors: is damaged"):
        open_source(path, like, check=True)
    payload.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"rank-00001.safetensors: has \d+ bytes"):
        open_source(path, like)
    payload.unlink()
    with pytest.raises(ValueError, match=r"rank-00001.safetensors: is missing"):
        open_source(path, like)


def test_universal_checkpoints(tmp_path):
    tensors = weights(1, torch.float32)
    like = write_folder(tmp_path / "like", weights(0, torch.bfloat16))
    for name, tensor in tensors.items():
        folder = tmp_path / f"step-3/zero/module.{name}"
        folder.mkdir(parents=True)
        # ZeRO-3's are flat tensors alone, the other stages' have their shape and a dictionary.
        content = tensor.reshape(-1) if name == LARGE else {"param": tensor, "cat_dim": 0}
        torch.save(content, folder / "fp32.pt")
    source = open_source(tmp_path / "step-3", like)
    assert_same(read(source), tensors)
    assert source.step == 3
    with pytest.raises(ValueError, match=r"must come with a Hugging Face directory .* --like"):
        open_source(tmp_path / "step-3")
    shutil.rmtree(tmp_path / f"step-3/zero/module.{SMALL}")
    with pytest.raises(ValueError, match=rf"got without \['{SMALL}'\]"):
        open_source(tmp_path / "step-3", like)


UNIVERSAL_STAGES = (1, 2, 3)


def save_by_deepspeed(folder: Path, out: Path) -> dict[int, dict[str, Tensor]]:
    """A step of a stock mixture under each stage, saved by DeepSpeed; the masters of each."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from transformers import AutoModelForCausalLM

    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    masters = {}
    for stage in UNIVERSAL_STAGES:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        }
        engine = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=settings
        )[0]
        ids = torch.arange(20)[None] + stage
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        engine.save_checkpoint(out / f"{stage}", tag="saved", save_latest=False)
        named = dict(engine.module.named_parameters())
        masters[stage] = {n: safe_get_full_fp32_param(p).clone() for n, p in named.items()}
    return masters


def to_universal(saved: Path, universal: Path) -> Path:
    """What `python -m deepspeed.checkpoint.ds_to_universal` makes of it."""
    from deepspeed.checkpoint import ds_to_universal

    words = ["ds_to_universal", "--input_folder", str(saved), "--output_folder", str(universal)]
    words += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    with patch.object(sys, "argv", words):
        ds_to_universal.main(ds_to_universal.parse_arguments())
    return universal


def expert_by_expert(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """With stacks as transformers writes them."""
    found = {}
    for name, value in named.items():
        prefix, _, stack = name.rpartition(".")
        if stack not in ("gate_up_proj", "down_proj"):
            found[name] = value
            continue
        halves = ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,)
        for number, expert in enumerate(value):
            for half, matrix in zip(halves, expert.chunk(len(halves)), strict=True):
                found[f"{prefix}.{number}.{half}.weight"] = matrix
    return found


def test_universal_checkpoints_of_deepspeed_itself(tmp_path):
    """Under ZeRO 1 to 3, of a mixture whose experts are stacked in the model and not on disk."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_experts=3,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "like")
    masters = run_ranks(save_by_deepspeed, 2, tmp_path / "like", tmp_path)[0]
    wanted = {stage: expert_by_expert(named) for stage, named in masters.items()}
    folders = []
    for stage in UNIVERSAL_STAGES:
        folder = to_universal(tmp_path / f"{stage}/saved", tmp_path / f"step-{stage}")
        assert_same(read(open_source(folder, tmp_path / "like")), wanted[stage])
        folders.append(folder)
    found = average(tmp_path / "out", *folders, like=tmp_path / "like")
    for name, value in found.items():
        mean = (wanted[1][name] + wanted[2][name] + wanted[3][name]) / 3
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"1/saved: must be a universal checkpoint"):
        open_source(tmp_path / "1/saved")


def train(workspace: Path, run_dir: Path) -> None:
    from triptych_core.config import load_config

    sft = sft_stage()
    words = [
        f"run.dir={run_dir}",
        "run.steps=4",
        "run.device=cpu",
        f"model.path={workspace / 'model'}",
        "model.init=random",
        "model.freeze=[vision]",
        f"data.shards=[{workspace / 'train/shards'}]",
        "data.seq_len=256",
        "data.num_workers=0",
        "engine.precision=fp32",
        "engine.zero.stage=3",
        "optim.lr=1e-2",
        "checkpoint.every=2",
    ]
    sft.main(load_config(sft.SftConfig, None, words))


def test_a_real_run_under_zero_3(tmp_path):
    """Names and shapes are those of the run's own export, which stock transformers loads."""
    from transformers import AutoModelForImageTextToText

    make_model_dir(tmp_path / "model")
    make_shards(tmp_path / "train", 40, seed=1)
    run_dir = tmp_path / "run"
    run_ranks(train, 2, tmp_path, run_dir)
    export = load_file(run_dir / "export/model.safetensors")
    newest = read(open_source(run_dir / "checkpoints/step-000004"))
    assert newest.keys() == export.keys()
    for name, tensor in export.items():
        assert torch.equal(newest[name].to(tensor.dtype), tensor), name
    before = read(open_source(run_dir / "checkpoints/step-000002"))
    found = average(tmp_path / "out", run_dir)
    assert_same(found, {name: (before[name] + newest[name]) / 2 for name in newest})
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    name = "model.language_model.norm.weight"
    assert torch.equal(model.state_dict()[name], found[name])


def pair(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """Two folders of which the second differs in something."""
    tensors = weights(1, torch.bfloat16)
    other = changes.pop("tensors", tensors)
    return (
        write_folder(tmp_path / "one", tensors),
        write_folder(tmp_path / "two", other, **changes),
    )


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return {**weights(1, torch.bfloat16), **tensors}


MISMATCHES = {
    "missing": (
        {"tensors": {k: v for k, v in changed().items() if k != SMALL}},
        rf"two: must have the tensors of .*one, got no {SMALL};",
    ),
    "more": ({"tensors": changed(extra=torch.ones(1))}, r"got also extra;"),
    "shape": (
        {"tensors": {**changed(), SMALL: torch.ones(34, dtype=torch.bfloat16)}},
        rf"must have the shapes of .*, got {SMALL} \[34\] not \[33\]",
    ),
    "dtype": (
        {"tensors": {**changed(), SMALL: torch.ones(33)}},
        rf"must have the dtypes of .*, got {SMALL} F32 not BF16",
    ),
    "config": ({"config": {**CONFIG, "hidden_size": 16}}, r"config.json: .* hidden_size 16 not 8"),
    "vocabulary": (
        {"vocabulary": {"a": 0, "b": 2, "d": 1}},
        r"must have the vocabulary of .*, got 'b' 2 not 1, 'c' absent not 2, 'd' 1 not absent",
    ),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_mismatches_are_refused_by_name(tmp_path, what):
    changes, message = MISMATCHES[what]
    with pytest.raises(ValueError, match=message):
        average(tmp_path / "out", *pair(tmp_path, **changes))
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_integers_must_be_equal(tmp_path):
    one = {**weights(1, torch.bfloat16), "index": torch.arange(5), "mask": torch.tensor([True])}
    two = {**weights(2, torch.bfloat16), "index": torch.arange(5), "mask": torch.tensor([True])}
    paths = [write_folder(tmp_path / "one", one), write_folder(tmp_path / "two", two)]
    found = average(tmp_path / "out", *paths)
    assert torch.equal(found["index"], one["index"]) and torch.equal(found["mask"], one["mask"])
    two["index"][3] = 7
    paths.append(write_folder(tmp_path / "three", two))
    with pytest.raises(ValueError, match=r"three: must hold the same integers of .*, got index;"):
        average(tmp_path / "no", *paths)
    found = average(tmp_path / "yes", *paths, exclude=("index",), copy_from=paths[2])
    assert torch.equal(found["index"], two["index"])


def test_eight_bit_floats_are_refused(tmp_path):
    tensors = {**weights(1, torch.bfloat16), "q": torch.ones(4).to(torch.float8_e4m3fn)}
    paths = [write_folder(tmp_path / name, tensors) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"must be in 16 bits or more .* got q F8_E4M3"):
        average(tmp_path / "out", *paths)


def test_what_may_differ_is_noted(tmp_path):
    config = {**CONFIG, "max_position_embeddings": 4096, "transformers_version": "4"}
    one, two = pair(tmp_path, config=config)
    for path, text in ((one, "{{ a }}"), (two, "{{ b }}")):
        (path / "chat_template.jinja").write_text(text)
        (path / "README.md").write_text("not carried")
    average(tmp_path / "out", one, two)
    facts = json.loads((tmp_path / "out/averaging.json").read_text())
    assert len(facts["notes"]) == 3 and "chat_template.jinja of" in facts["notes"][-1]
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ a }}"
    assert not (tmp_path / "out/README.md").exists()
    assert [record["path"] for record in facts["inputs"]] == [str(one), str(two)]


def test_broken_files_are_named(tmp_path):
    one, two = pair(tmp_path)
    file = two / "model.safetensors"
    whole = file.read_bytes()
    for data in (whole[:-1], whole[:100], b"", whole[:8] + b"x" + whole[9:], whole + b"."):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"two/model.safetensors: must be a whole safetensors"):
            average(tmp_path / "out", one, two)
    file.write_bytes(whole)
    (two / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"two/config.json: must be a JSON object"):
        average(tmp_path / "out", one, two)
    (two / "config.json").unlink()
    with pytest.raises(ValueError, match=r"two: must hold config.json"):
        average(tmp_path / "out", one, two)


def test_an_index_must_be_true(tmp_path):
    tensors = weights(1, torch.bfloat16)
    path = shard(write_folder(tmp_path / "one", tensors), tensors)
    (path / "b.safetensors").rename(path / "c.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors: must be there as model.safe"):
        open_source(path)
    shutil.copy(path / "a.safetensors", path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors: must hold the tensors .* got without"):
        open_source(path)


def test_other_folders_are_told_apart(tmp_path):
    for name, file, message in (
        ("adapter", "adapter_config.json", "got an adapter; merge it"),
        ("zero", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "ds_to_universal"),
        ("nothing", "notes.txt", r"got \['notes.txt'\]"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / name)
    one, two = pair(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: must be a folder, got nothing there"):
        make_job(Request((one, tmp_path / "nowhere"), tmp_path / "out"))
    with pytest.raises(ValueError, match=r"one: must be named once"):
        make_job(Request((one, two, one), tmp_path / "out"))
    with pytest.raises(ValueError, match=r"INPUTS: must be two or more, got 1"):
        make_job(Request((one,), tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--exclude: must match .* 'model.scal'; did you mean"):
        average(tmp_path / "out", one, two, exclude=("model.scal",))
