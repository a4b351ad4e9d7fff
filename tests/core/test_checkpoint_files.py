"""What is on the disk: payloads in any cut, damage found by file name, no kill that loses a run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from triptych_core.checkpoint.folders import checkpoints, make_room, retire, unfinished_folder
from triptych_core.checkpoint.fragments import _share
from triptych_core.checkpoint.host_copy import HostCopy
from triptych_core.checkpoint.manifest import find_damage, find_loss
from triptych_core.checkpoint.payload import Payloads, Stretch, write_payload
from triptych_core.checkpoint.save import Snapshot, finish, write_share

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float16]


def state(seed: int) -> dict[tuple[str, str], Tensor]:
    """Flat tensors of odd sizes and several dtypes, by name and kind."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        numbers = torch.randint(0, 100, (2 * number + 1,), generator=generator)
        tensors[f"layer.{number}|odd", "master"] = numbers.to(dtype)
    return tensors | {("layer.0|odd", "exp_avg"): torch.randn(1, generator=generator)}


def shares(tensors: dict[tuple[str, str], Tensor], num_ranks: int) -> list[list[Stretch]]:
    whole = [Stretch(name, kind, 0, tensor) for (name, kind), tensor in tensors.items()]
    return [_share(whole, rank, num_ranks) for rank in range(num_ranks)]


def save(run_dir: Path, step: int, num_ranks: int = 2, keep: int = 2) -> Path:
    """What the ranks of a job do, one after the other."""
    folder = unfinished_folder(run_dir, step)
    make_room(folder, 1)
    records = {}
    for rank, mine in enumerate(shares(state(step), num_ranks)):
        scalars = {"layer.0|odd": {"step": step}}
        snapshot = Snapshot(folder, rank, mine, scalars, b"generators", {"step": step}, keep)
        records |= write_share(snapshot)
    return finish(snapshot, records)


def newest_whole(run_dir: Path) -> Path:
    return [path for path in checkpoints(run_dir) if find_damage(path) is None][-1]


@pytest.mark.parametrize("writers", [1, 2, 3, 40])
def test_any_cut_is_read_in_any_other(tmp_path, writers):
    tensors = state(7)
    paths = []
    for rank, mine in enumerate(shares(tensors, writers)):
        paths.append(tmp_path / f"rank-{rank}.safetensors")
        write_payload(paths[-1], mine, {"layer.0|odd": {"step": 3}} if rank == 0 else {})
        plain = load_file(paths[-1])  # the library's own reader finds the same
        assert {key: plain[key].tolist() for key in plain} == {
            stretch.key: stretch.tensor.tolist() for stretch in mine
        }
    payloads = Payloads(paths)
    assert payloads.scalars == {"layer.0|odd": {"step": 3}}
    assert payloads.kinds("layer.0|odd") == {"master": torch.float32, "exp_avg": torch.float32}
    for readers in (1, 2, 5):
        read = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
        for mine in shares(read, readers):
            for stretch in mine:
                payloads.fill(stretch)
        for key, tensor in tensors.items():
            assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor), key


def test_an_element_that_nobody_wrote_is_missed(tmp_path):
    path = tmp_path / "rank-0.safetensors"
    write_payload(path, [Stretch("w", "master", 0, torch.ones(4))], {})
    write_payload(tmp_path / "b", [Stretch("w", "master", 5, torch.ones(4))], {})
    payloads = Payloads([path, tmp_path / "b"])
    payloads.fill(Stretch("w", "master", 5, torch.zeros(4)))
    with pytest.raises(ValueError, match=r"w: master must be whole .* elements 4 to 6"):
        payloads.fill(Stretch("w", "master", 2, torch.zeros(4)))


def test_ranks_share_evenly():
    for ranks in (1, 2, 3, 7):
        sizes = [sum(s.tensor.numel() for s in mine) for mine in shares(state(1), ranks)]
        assert max(sizes) - min(sizes) <= 1


def test_a_copy_keeps_what_was_and_uses_its_room_again():
    tensors = state(7)
    (mine,) = shares(tensors, 1)
    copy = HostCopy(block_bytes=16)
    for _ in range(2):
        wanted = {key: tensor.clone() for key, tensor in tensors.items()}
        copies = copy.take(mine)
        for tensor in tensors.values():
            tensor.copy_(tensor == 0)
        rooms = {stretch.tensor.untyped_storage().data_ptr() for stretch in copies}
        assert sum(s.num_bytes for s in copies) == sum(s.num_bytes for s in mine)
        assert len(copies) > len(mine) and len(rooms) == len(copy._blocks)
        for stretch in copies:
            begin, end = stretch.begin, stretch.begin + stretch.tensor.numel()
            assert torch.equal(stretch.tensor, wanted[stretch.name, stretch.kind][begin:end])


@pytest.mark.parametrize("kind", ["rank", "random", "state", "manifest"])
def test_every_damage_is_found_by_file_name(tmp_path, kind):
    whole = save(tmp_path, 2)
    (name,) = [path.name for path in whole.glob(f"{kind}*") if "00001" not in path.name]
    choose = random.Random(kind)
    size = (whole / name).stat().st_size
    for trial in range(120):
        damaged = tmp_path / "damaged"
        shutil.copytree(whole, damaged)
        path = damaged / name
        data = bytearray(path.read_bytes())
        at = choose.randrange(size)
        if trial % 4 == 3:
            del data[at:]
        elif trial % 4 == 2:
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        else:
            data[at] ^= 1 << choose.randrange(8)
        same = bytes(data) == path.read_bytes() or harmless(kind, data, path)
        path.write_bytes(data)
        found = find_damage(damaged)
        assert same or (found is not None and found.startswith(f"{path}: ")), (trial, at, found)
        shutil.rmtree(damaged)
    (whole / name).unlink()
    assert find_damage(whole) == f"{whole / name}: is missing"


def harmless(kind: str, data: bytearray, path: Path) -> bool:
    """A blank of the manifest that became another one."""
    return kind == "manifest" and data.split() == path.read_bytes().split()


def test_files_of_two_checkpoints_or_ranks_are_not_mixed(tmp_path):
    first, second = save(tmp_path, 2), save(tmp_path, 4)
    name = "rank-00001.safetensors"
    assert (first / name).stat().st_size == (second / name).stat().st_size
    shutil.copy(first / name, second / name)
    assert find_loss(second) is None
    assert find_damage(second, 0, 1) == (
        f"{second / name}: is damaged, its SHA-256 is not the one in manifest.json"
    )
    found = [find_damage(second, rank, 3) for rank in range(3)]
    assert len([damage for damage in found if damage]) == 1  # one rank reads it


def test_the_last_whole_one_stays(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=3)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["4", "6", "8"]
    for path in checkpoints(tmp_path)[1:]:
        (path / "state.json").unlink()
    # A run that went back to 4 and saves 5: neither 6 nor 8 is of its past.
    save(tmp_path, 5, keep=2)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["4", "5"]
    (checkpoints(tmp_path)[-1] / "manifest.json").unlink()
    retire(tmp_path, 5, keep=1)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["4"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(ValueError, match=r"must have 1024\.00 GiB free .* got "):
        make_room(unfinished_folder(tmp_path, 4), 1 << 40)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("resaved", [False, True], ids=["next", "again"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_one(tmp_path, resaved):
    before = tmp_path / "before"
    for step in (2, 4):
        save(before, step)
    if resaved:  # 6 was damaged, and the run comes there a second time
        (save(before, 6, keep=3) / "state.json").write_text("{}")
    points = 0
    while True:
        run_dir = tmp_path / "run"
        shutil.copytree(before, run_dir)
        died = save_and_die(run_dir, 6, points)
        path = newest_whole(run_dir)
        step = int(path.name[-1])
        assert step in (4, 6)
        payloads = Payloads(path.glob("rank-*"))
        for (name, kind), tensor in state(step).items():
            target = Stretch(name, kind, 0, torch.zeros_like(tensor))
            payloads.fill(target)
            assert torch.equal(target.tensor, tensor)
        save(run_dir, 8)  # the next one clears away what the dead left
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert left == [f"step-00000{step}", "step-000008"]
        shutil.rmtree(run_dir)
        if not died:
            break
        points += 1
    assert points >= 20 and step == 6


def save_and_die(run_dir: Path, step: int, point: int) -> bool:
    """Save in a child that is killed before the `point`-th thing it does to the disk."""
    child = os.fork()
    if child == 0:
        left = [point]

        def watch(event: str, arguments: tuple) -> None:
            if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(watch)
        save(run_dir, step)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
