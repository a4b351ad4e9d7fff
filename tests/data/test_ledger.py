import json
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch

from tests.data.packs import tiny_config, tiny_processor, write_mixture
from triptych_data.faults import Hole
from triptych_data.loader import PackLoader
from triptych_data.plan.ledger import Ledger, audit, read_ledger
from triptych_data.prepare import Place
from triptych_data.tensors.config import TensorDataConfig
from triptych_data.tensors.joined import JoinedLoader
from triptych_data.tensors.loader import TensorLoader
from triptych_data.tensors.write import write_tensor_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture"))


def train(shards, folder, steps, *, world_size=1, start_step=0, position=0, gas=2, **settings):
    """Take steps on all ranks, one after the other; returns the position reached."""
    for rank in range(world_size):
        config = tiny_config(shards, **settings)
        loader = PackLoader(config, tiny_processor(), rank=rank, world_size=world_size)
        loader.position = position
        ledger = Ledger(folder, rank=rank, world_size=world_size, start_step=start_step)
        stream = ledger.watch(loader)
        for step in range(start_step + 1, start_step + steps + 1):
            assert len(list(islice(stream, gas))) == gas
            ledger.write(step)
    return loader.position


def test_a_line_per_step_says_what_was_consumed(shards, tmp_path):
    position = train(shards, tmp_path, 3, world_size=2)
    first, second = (read_ledger(tmp_path / f"rank-0000{rank}.jsonl") for rank in (0, 1))
    assert [line["step"] for line in first] == [line["step"] for line in second] == [1, 2, 3]
    assert [line["position"] for line in first] == [line["position"] for line in second]
    assert first[-1]["position"] == position
    packs = [
        (mine, other)
        for f, s in zip(first, second, strict=True)
        for mine, other in zip(f["packs"], s["packs"], strict=True)
    ]
    assert len(packs) == 6
    for mine, other in packs:
        assert mine["end"] == other["position"] == mine["position"] + len(mine["keys"])


def test_a_sound_run_has_no_problems(shards, tmp_path):
    train(shards, tmp_path, 20, world_size=2)
    found = audit(tmp_path)
    assert found.problems == []
    assert (found.steps, found.holes, found.left_out) == (20, 0, 0)
    assert found.epochs > 3 and found.samples > 180


def test_samples_too_long_are_counted_as_left_out(shards, tmp_path):
    train(shards, tmp_path, 30, seq_len=100, long_samples="skip", max_bad_rate=1.0)
    found = audit(tmp_path)
    assert found.problems == [] and found.epochs > 1
    assert found.left_out > 0


@pytest.mark.parametrize(("before", "after"), [(2, 2), (4, 1), (1, 4)])
def test_a_resume_cuts_the_steps_it_takes_again(shards, tmp_path, before, after):
    position = train(shards, tmp_path, 4, world_size=before)
    train(shards, tmp_path, 3, world_size=before, start_step=4, position=position)  # to be lost
    with (tmp_path / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 8, "pos')  # killed in the middle of a line
    train(shards, tmp_path, 5, world_size=after, start_step=4, position=position)
    found = audit(tmp_path)
    assert found.problems == [] and found.steps == 9
    steps = [line["step"] for line in read_ledger(tmp_path / "rank-00000.jsonl")]
    assert steps == list(range(1, 10))


def test_a_resume_at_the_wrong_position_is_found(shards, tmp_path):
    position = train(shards, tmp_path, 4)
    train(shards, tmp_path / "other", 6)
    lines = read_ledger(tmp_path / "other" / "rank-00000.jsonl")
    repeated, skipped = lines[2]["position"], lines[5]["position"]
    train(shards, tmp_path, 2, start_step=4, position=repeated)
    again = re.findall(r"(\d+) samples were taken again", "\n".join(audit(tmp_path).problems))
    assert sum(map(int, again)) == position - repeated
    train(shards, tmp_path, 2, start_step=4, position=skipped)
    assert audit(tmp_path).problems == [
        f"position {position}: {skipped - position} samples were lost before {skipped}"
    ]


def change(folder, edit, rank=0):
    path = folder / f"rank-{rank:05d}.jsonl"
    lines = read_ledger(path)
    edit(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_forged_ledgers_are_found(shards, tmp_path):
    train(shards, tmp_path, 20)

    def repeat_a_sample(lines):
        packs = lines[0]["packs"]
        packs[0]["ids"][0] = packs[1]["ids"][0]

    change(tmp_path, repeat_a_sample)
    twice, missing = audit(tmp_path).problems
    assert twice.startswith("epoch 0: 1 samples were taken twice")
    assert missing.startswith("epoch 0: 1 samples that other epochs have are missing")
    assert audit(tmp_path, once_per_epoch=False).problems == []
    change(tmp_path, lambda lines: lines.pop(3))
    assert "step 4: must be in a ledger, got no line" in audit(tmp_path).problems


def test_holes_count_as_consumed(tmp_path):
    ledger = Ledger(tmp_path, rank=0, world_size=1)
    lost = Hole("b", "web", "damaged", "…", 7)
    batch = {
        "place": Place(0, 3, 3, 0),
        "sample_keys": ["a", "c"],
        "sample_ids": [0, 1],
        "holes": [lost],
    }
    assert list(ledger.watch([batch])) == [batch]
    ledger.write(1)
    found = audit(tmp_path)
    assert (found.samples, found.holes, found.left_out, found.problems) == (2, 1, 0, [])
    (line,) = read_ledger(tmp_path / "rank-00000.jsonl")
    assert line["packs"][0]["holes"] == [["b", "web", "damaged", "…", 7]]


def joined(shards, latents, rank, world_size):
    """Rows of chats, each with a batch of latents."""
    rows = PackLoader(tiny_config(shards), tiny_processor(), rank=rank, world_size=world_size)
    config = TensorDataConfig(shards=[str(latents)], batch_size=3, num_workers=0, max_bad_rate=1.0)
    tensors = TensorLoader(config, rank=rank, world_size=world_size, num_classes=None)
    return JoinedLoader(
        rows, tensors, lambda row, batch: row | {"num_images": len(batch)}, name="x"
    )


def train_joined(shards, latents, folder, steps, world_size, start_step=0, state=None):
    for rank in range(world_size):
        loader = joined(shards, latents, rank, world_size)
        if state:
            loader.load_state_dict(state)
        ledger = Ledger(folder, rank=rank, world_size=world_size, start_step=start_step)
        stream = ledger.watch(loader)
        for step in range(start_step + 1, start_step + steps + 1):
            next(stream)
            ledger.write(step)
    return json.loads(json.dumps(loader.state_dict()))


def test_samples_that_rows_are_joined_with_are_in_it(shards, tmp_path):
    """Through epochs of seven of them, one damaged, and a resume on fewer ranks."""
    samples = [({}, {"latents": torch.full((1, 2, 2), float(i))}) for i in range(7)]
    (shard,) = write_tensor_shards(samples, tmp_path / "latents")
    raw = bytearray(shard.read_bytes())
    raw[raw.find(torch.full((4,), 4.0).numpy().tobytes())] ^= 1
    shard.write_bytes(raw)
    latents, book = tmp_path / "latents", tmp_path / "ledger"
    state = train_joined(shards, latents, book, 4, world_size=2)
    train_joined(shards, latents, book, 2, 2, start_step=4, state=state)  # to be lost
    train_joined(shards, latents, book, 5, 1, start_step=4, state=state)
    found = audit(book)
    assert found.problems == [] and found.steps == 9
    drawn = found.joined["x"]
    assert (drawn.samples + drawn.holes, drawn.left_out, drawn.epochs) == (3 * (8 + 5), 0, 6)
    assert drawn.holes == 5  # in each whole epoch
    lines = read_ledger(book / "rank-00000.jsonl")
    lost = [
        hole for line in lines for pack in line["joined"]["x"]["packs"] for hole in pack["holes"]
    ]
    assert {(key, reason, sample) for key, _, reason, _, sample in lost} == {
        ("000000004", "damaged", 4)
    }
    assert all(f"{shard}: sample 000000004" in message for *_, message, _ in lost)

    def repeat_a_sample(lines):
        packs = lines[0]["joined"]["x"]["packs"]
        packs[0]["ids"][0] = packs[0]["ids"][1]

    change(book, repeat_a_sample)
    assert [problem[:33] for problem in audit(book).problems] == [
        "x: epoch 0: 1 samples were taken ",
        "x: epoch 0: 1 samples that other ",
    ]


def test_a_joined_row_names_the_samples_of_both(shards, tmp_path):
    write_tensor_shards([({}, {"latents": torch.zeros(1, 2, 2)})] * 3, tmp_path / "latents")
    loader = joined(shards, tmp_path / "latents", 0, 1)
    row = next(iter(loader))
    rows = row["streams"][""]
    assert sorted(row["sample_keys"][:3]) == ["x/000000000", "x/000000001", "x/000000002"]
    assert row["sample_keys"][3:] == rows["sample_keys"] and rows["sample_keys"]
    assert row["sample_ids"] == rows["sample_ids"] and row["place"] == rows["place"]
    assert loader.doing().startswith(f"reading {tmp_path / 'latents'}")


def test_no_ledger_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"must hold rank-\*\.jsonl, got none; set data\.ledger"):
        audit(tmp_path)


def test_the_command_prints_and_fails_where_something_is_wrong(shards, tmp_path):
    train(shards, tmp_path, 20)

    def run(*words):
        command = [sys.executable, "-m", "triptych_data.plan.ledger", str(tmp_path), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    code, text = run()
    assert code == 0 and text.startswith("20 steps, ")
    change(tmp_path, lambda lines: lines.pop(3))
    code, text = run("--mixed")
    assert code == 1 and "step 4: must be in a ledger" in text
    assert run("--wrong")[0] == 2
