"""Latents in shards: written once, read the same on any ranks, and nothing hostile gets through."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save, save_file

from triptych_data.cli.main import main
from triptych_data.faults import BadSample
from triptych_data.shards.index import read_index
from triptych_data.shards.reader import Shards
from triptych_data.shards.tarwriter import TarWriter
from triptych_data.tensors.config import TensorDataConfig
from triptych_data.tensors.loader import TensorLoader, heldout_batches
from triptych_data.tensors.record import Wanted, decode, encode
from triptych_data.tensors.write import write_tensor_shards

COUNT, SHAPE = 11, (2, 3, 3)
ROWS = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """11 samples, 4 a shard, written by the command from two kinds of files."""
    path = tmp_path_factory.mktemp("latents")
    numbers = np.arange(COUNT)
    first = {"latents": ROWS[:5].numpy(), "labels": numbers[:5] % 3, "number": numbers[:5]}
    np.savez(path / "a.npz", **first)
    rest = {"latents": ROWS[5:], "labels": torch.arange(5, COUNT) % 3}
    save_file(rest | {"number": torch.arange(5, COUNT)}, path / "b.safetensors")
    words = ["latents", str(path / "a.npz"), str(path / "b.safetensors"), str(path / "shards")]
    done = CliRunner().invoke(main, [*words, "--samples-per-shard", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.output)["shards"]) == 3
    return path / "shards"


def loader(shards, *, rank=0, world_size=1, **fields) -> TensorLoader:
    fields = {"batch_size": 2, "num_workers": 0} | fields
    config = TensorDataConfig(shards=[str(shards)], **fields)
    return TensorLoader(config, rank=rank, world_size=world_size, num_classes=3)


def take(stream, count: int) -> list[dict]:
    return list(islice(stream, count))


def by_sample(batches: list[dict]) -> list[tuple]:
    """(sample, latents, noise, time, drop, label) of each, in order."""
    names = ("latents", "noise", "times", "drops", "labels")
    return [
        (sample, *(batch[name][row].tolist() for name in names))
        for batch in batches
        for row, sample in enumerate(batch["sample_ids"])
    ]


def test_what_is_written_is_read(shards):
    opened = Shards.open(shards)
    assert [index.layout for index in opened.indexes] == ["members"] * 3
    batches = take(loader(shards, batch_size=COUNT), 1)
    batch = batches[0]
    for row, sample in enumerate(batch["sample_ids"]):
        torch.testing.assert_close(batch["latents"][row], ROWS[sample])
        assert batch["labels"][row] == sample % 3
        assert json.loads(bytes(opened.read_members(sample)[0])) == {
            "number": sample,
            "label": sample % 3,
        }
    assert batch["num_targets"] == ROWS.numel()
    assert batch["num_tokens"] == COUNT
    done = CliRunner().invoke(main, ["verify", str(shards)])
    assert done.exit_code == 0, done.output


def test_every_epoch_has_each_sample_once_in_another_order(shards):
    found = [sample for sample, *_ in by_sample(take(loader(shards), 11))]
    first, second = found[:COUNT], found[COUNT:]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second


def test_the_stream_is_the_same_on_any_ranks_workers_and_after_a_resume(shards):
    alone = by_sample(take(loader(shards, batch_size=4), 6))
    ranks = [take(loader(shards, rank=rank, world_size=2), 6) for rank in range(2)]
    dealt = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert by_sample(dealt) == alone
    started = loader(shards, batch_size=4)
    begun = take(started, 2)
    state = json.loads(json.dumps(started.state_dict()))
    other = loader(shards, batch_size=2, num_workers=2)
    other.load_state_dict(state)
    assert by_sample([*begun, *take(other, 8)]) == alone


def test_noise_and_time_depend_on_seed_and_epoch(shards):
    batches = take(loader(shards, batch_size=COUNT), 2)
    first, second = ({row[0]: row[2:5] for row in by_sample([b])} for b in batches)
    other = {r[0]: r[2:5] for r in by_sample(take(loader(shards, batch_size=COUNT, seed=1), 1))}
    for sample in range(COUNT):
        assert len({str(x[sample]) for x in (first, second, other)}) == 3
    noise = torch.tensor([noise for noise, *_ in first.values()])
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 1) < 0.1


def test_latents_are_normalised_and_drawn_from_their_posterior(tmp_path):
    samples = [({}, {"latents": ROWS[0], "latents_std": torch.full(SHAPE, 0.5)})] * 400
    write_tensor_shards(samples, tmp_path / "shards")
    config = TensorDataConfig(
        shards=[str(tmp_path / "shards")], batch_size=400, num_workers=0, mean=[1, -1], std=[2.0]
    )
    (batch,) = take(TensorLoader(config, rank=0, world_size=1, num_classes=None), 1)
    assert "labels" not in batch
    latents = batch["latents"] * 2 + torch.tensor([1.0, -1.0]).view(2, 1, 1)
    assert (latents.mean(0) - ROWS[0]).abs().max() < 0.12
    assert (latents.std(0) - 0.5).abs().max() < 0.1
    apart = torch.corrcoef(torch.stack([(latents - ROWS[0]).flatten(), batch["noise"].flatten()]))
    assert abs(apart[0, 1]) < 0.05


def test_latents_of_a_condition_are_normalised_as_diffusers_does(tmp_path):
    """In WanImageToVideoPipeline and WanVideoToVideoPipeline: by the mean and spread of all."""
    frames = torch.randn(3, 2, 3, 2, 2)
    names = ("latents", "image_latents", "source_latents", "masks")
    samples = [({}, {name: row.clone() for name in names}) for row in frames]
    write_tensor_shards(samples, tmp_path / "shards")
    config = TensorDataConfig(
        shards=[str(tmp_path / "shards")],
        batch_size=3,
        num_workers=0,
        features=list(names[1:]),
        mean=[1, -1],
        std=[2.0],
    )
    (batch,) = take(TensorLoader(config, rank=0, world_size=1, num_classes=None), 1)
    expected = (frames[batch["sample_ids"]] - torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)) / 2
    for name in names[:3]:
        assert torch.equal(batch[name], expected), name
    assert torch.equal(batch["masks"], frames[batch["sample_ids"]])  # no latents


def test_heldout_samples_come_once_on_every_rank_as_often_and_always_alike(shards):
    config = TensorDataConfig(shards=["x"], batch_size=2)
    ranks = [list(heldout_batches(config, [str(shards)], r, 2, 3)) for r in range(2)]
    assert [len(batches) for batches in ranks] == [3, 3]
    rows = by_sample([batch for batches in ranks for batch in batches])
    assert sorted(row[0] for row in rows) == list(range(COUNT))
    assert ranks[1][2]["num_targets"] == 18
    assert ranks[1][2]["weights"].tolist() == [1, 0]
    again = [batch for r in range(2) for batch in heldout_batches(config, [str(shards)], r, 2, 3)]
    assert by_sample(again) == rows


def test_a_resume_on_other_data_is_refused_by_name(shards, tmp_path):
    state = loader(shards).state_dict()
    write_tensor_shards([({"label": 1}, {"latents": ROWS[0]})], tmp_path / "other")
    for other, name in ((loader(tmp_path / "other"), "shards"), (loader(shards, seed=2), "seed")):
        with pytest.raises(ValueError, match=f"checkpoint data state: {name}"):
            other.load_state_dict(state)
    anyway = loader(shards, seed=2, resume_anyway=True)
    anyway.load_state_dict(state | {"position": 4})
    assert anyway.position == 4
    assert anyway.state_dict()["resumed_anyway"][0]["changed"]["seed"] == {"was": 0, "is": 2}


GOOD = {"latents": torch.zeros(SHAPE)}
BAD = {
    "damaged": ({"label": 1}, b"\xff" * 40),
    "a huge header": ({"label": 1}, (2**62).to_bytes(8, "little") + b"{}"),
    "offsets beyond its end": ({"label": 1}, save(GOOD)[:-4]),
    "no latents": ({"label": 1}, save({"other": torch.zeros(SHAPE)})),
    "wrong shape": ({"label": 1}, save({"latents": torch.zeros(3, 2, 3)})),
    "wrong shape of std": ({"label": 1}, save(GOOD | {"latents_std": torch.zeros(1)})),
    "wrong dtype": ({"label": 1}, save({"latents": torch.zeros(SHAPE, dtype=torch.int64)})),
    "not finite": ({"label": 1}, save({"latents": torch.full(SHAPE, torch.inf)})),
    "a label beyond": ({"label": 3}, save(GOOD)),
    "a negative label": ({"label": -1}, save(GOOD)),
    "a label that is true": ({"label": True}, save(GOOD)),
    "no label": ({}, save(GOOD)),
    "no object": ([1], save(GOOD)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_model_could_stumble_over_is_refused(name):
    record, tensors = BAD[name]
    members = [memoryview(json.dumps(record).encode()), memoryview(tensors)]
    with pytest.raises(BadSample, match=r"^here: .*, got "):
        decode(members, "here", Wanted({"latents": SHAPE, "latents_std": SHAPE}, 3))


def test_a_bad_sample_leaves_a_hole_of_weight_0(tmp_path):
    tmp_path.joinpath("shards").mkdir()
    with TarWriter(tmp_path / "shards/a.tar") as tar:
        for number, name in enumerate((None, "not finite", None)):
            members = encode({"label": 0}, GOOD)
            if name:
                members[1] = BAD[name][1]
            tar.add_members(
                str(number), ["json", "safetensors"], ["json", "safetensors"], members, [], 0
            )
        tar.finish("members")
    stream = loader(tmp_path / "shards", batch_size=3, max_bad_rate=1.0)
    (batch,) = take(stream, 1)
    assert [hole.reason for hole in batch["holes"]] == ["not finite"]
    assert sorted(batch["sample_ids"]) == [0, 2]
    assert batch["num_targets"] == 36
    assert batch["weights"].sum() == 2
    row = batch["weights"].tolist().index(0)
    assert not batch["latents"][row].any()
    assert not batch["noise"][row].any()
    with pytest.raises(ValueError, match=r"data.max_bad_rate"):
        take(loader(tmp_path / "shards", batch_size=3, max_bad_rate=0.0), 1)


def test_arrays_of_another_kind_are_refused_and_nothing_is_written(tmp_path):
    np.savez(tmp_path / "objects.npz", latents=np.array([{"a": 1}, None], dtype=object))
    np.savez(tmp_path / "ragged.npz", latents=np.zeros((2, 1, 2, 2), "f4"), labels=np.zeros(3))
    np.savez(tmp_path / "unnamed.npz", np.zeros((2, 1, 2, 2), "f4"))
    np.savez(tmp_path / "nan.npz", latents=np.full((2, 1, 2, 2), np.nan, "f4"))
    np.save(tmp_path / "one.npy", np.zeros((2, 1, 2, 2), "f4"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "nan.npz").read_bytes()[:90])
    for name in ("objects.npz", "ragged.npz", "unnamed.npz", "nan.npz", "one.npy", "cut.npz"):
        done = CliRunner().invoke(main, ["latents", str(tmp_path / name), str(tmp_path / "out")])
        assert done.exit_code == 1, name
        assert ", got " in done.output, name
        assert not list((tmp_path / "out").rglob("*.tar")), name


def test_texts_and_features_come_with_videos(tmp_path):
    videos = torch.randn(3, 2, 4, 2, 2)
    texts, images = torch.randn(3, 5, 6), torch.randn(3, 7)
    arrays = {"latents": videos, "text_features": texts, "image_features": images}
    save_file(arrays | {"text_lens": torch.tensor([5, 2, 1])}, tmp_path / "a.safetensors")
    save_file({"text_features": torch.full((2, 6), 9.0)}, tmp_path / "empty.safetensors")
    words = ["latents", str(tmp_path / "a.safetensors"), str(tmp_path / "shards")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    config = TensorDataConfig(
        shards=[str(tmp_path / "shards")],
        batch_size=3,
        num_workers=0,
        text_len=8,
        empty_text=tmp_path / "empty.safetensors",
        features=["image_features"],
        given_frames=1,
    )
    (batch,) = take(TensorLoader(config, rank=0, world_size=1, num_classes=None), 1)
    assert batch["given_frames"] == 1
    assert batch["num_targets"] == 3 * 2 * 3 * 4  # the first frame of four is no target
    assert batch["text_features"].shape == (3, 8, 6)
    for row, sample in enumerate(batch["sample_ids"]):
        length = (5, 2, 1)[sample]
        assert torch.equal(batch["text_features"][row, :length], texts[sample, :length])
        assert not batch["text_features"][row, length:].any()
        assert torch.equal(batch["image_features"][row], images[sample])
        assert torch.equal(batch["latents"][row], videos[sample])
    assert batch["empty_text"][0, :, 0].tolist() == [9, 9, 0, 0, 0, 0, 0, 0]
    for change, message in (
        ({"given_frames": 4}, "data.given_frames"),
        ({"text_len": 4}, r"text_features must be at most \(4, 6\)"),
        ({"features": ["masks"]}, "must hold a tensor named masks"),
        ({"empty_text": tmp_path / "a.safetensors"}, "must hold text_features of at most 8"),
    ):
        with pytest.raises(ValueError, match=message):
            TensorLoader(config.model_copy(update=change), rank=0, world_size=1, num_classes=None)


def test_shards_of_chats_are_refused(tmp_path):
    from triptych_data.shards.write import write_shards

    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    write_shards(tmp_path / "x.jsonl", tmp_path / "chats")
    with pytest.raises(ValueError, match="triptych-data latents"):
        loader(tmp_path / "chats")
    assert read_index(next((tmp_path / "chats").glob("*.tar"))).layout == "chat"


def test_words_of_a_sample_are_kept_and_read(tmp_path):
    """As .npz holds them; a sample without words, or whose words no tokenizer takes, is a hole."""
    rows = {"latents": ROWS[:4].numpy(), "labels": np.arange(4) % 3}
    texts = np.array(["a red ball", " ", "zwei Bälle", "a \U0010f001 ball"])
    np.savez(tmp_path / "a.npz", **rows, caption=texts)
    done = CliRunner().invoke(main, ["latents", str(tmp_path / "a.npz"), str(tmp_path / "shards")])
    assert done.exit_code == 0, done.output
    fields = {"text_field": "caption", "max_bad_rate": 1.0, "batch_size": 4}
    (batch,) = take(loader(tmp_path / "shards", **fields), 1)
    assert batch["texts"] == [texts[sample] for sample in batch["sample_ids"]]
    assert sorted(batch["sample_ids"]) == [0, 2]
    assert {hole.reason for hole in batch["holes"]} == {"no text", "reserved characters"}
    assert int(batch["weights"].sum()) == 2
    assert "texts" not in take(loader(tmp_path / "shards"), 1)[0]
    saved = loader(tmp_path / "shards").state_dict()
    with pytest.raises(ValueError, match="text_field"):
        loader(tmp_path / "shards", **fields).load_state_dict(saved)
