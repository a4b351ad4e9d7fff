import io
import json
import tarfile
from itertools import islice

import pytest

from tests.data.chats import chat, encoded_image, write_jsonl
from tests.data.packs import tiny_config, tiny_processor, write_mixture
from triptych_data.faults import WINDOW, BadSample, Faults, Hole, reason_of
from triptych_data.loader import PackLoader, eval_batches
from triptych_data.plan.lengths import sample_lengths
from triptych_data.sample import RawSample
from triptych_data.shards.index import write_index
from triptych_data.shards.reader import Shards
from triptych_data.shards.scan import build_index
from triptych_data.shards.write import write_shards

COUNT = 40
SIDE = 64, 48


def write_pictures(folder, broken=()):
    """A tar of COUNT samples with an image each; what `broken` names is what Pillow's header
    check cannot see: images cut off behind it."""
    folder.mkdir(exist_ok=True)
    tar = folder / "made-elsewhere.tar"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for i in range(COUNT):
            image = encoded_image(*SIDE, shade=i)[: 800 if i in broken else None]
            part = {"type": "image", "index": 0}
            record = {"messages": [{"role": "user", "content": [part]}, chat()["messages"][1]]}
            for suffix, data in (("json", json.dumps(record).encode()), ("0.jpg", image)):
                info = tarfile.TarInfo(f"s{i}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    write_index(tar, build_index(tar))
    return tar


def open_loader(paths, **settings):
    settings = {"seq_len": 128, "max_bad_rate": 1.0} | settings
    config = tiny_config([str(path) for path in paths], **settings)
    return PackLoader(config, tiny_processor(), rank=0, world_size=1)


def first_epoch(loader):
    batches = []
    for batch in loader:
        if batch["place"].epoch:
            return batches
        batches.append(batch)
    return batches


def flip_byte(path, sample):
    """Change a byte in the middle of a sample of the only shard of a list."""
    index = Shards.open([path]).indexes[0]
    data = bytearray(path.read_bytes())
    data[int(index.sample_start[sample : sample + 2].sum()) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_leave_holes_and_the_plan_as_it_is(tmp_path, num_workers):
    sound = first_epoch(open_loader([write_pictures(tmp_path / "sound")]))
    tar = write_pictures(tmp_path / "broken", broken=(5, 17))
    loader = open_loader([tar], num_workers=num_workers)
    flip_byte(tar, 30)
    batches = first_epoch(loader)
    holes = {hole.key: hole for batch in batches for hole in batch["holes"]}
    reasons = {"s5": "corrupt image", "s17": "corrupt image", "s30": "damaged"}
    assert {key: hole.reason for key, hole in holes.items()} == reasons
    assert {hole.source for hole in holes.values()} == {"shards"}
    assert "made-elsewhere.tar: sample s5: image 0: " in holes["s5"].message
    assert len(batches) == len(sound)
    for batch, whole in zip(batches, sound, strict=True):
        assert batch["place"] == whole["place"]
        lost = {hole.key for hole in batch["holes"]}
        assert batch["sample_keys"] == [key for key in whole["sample_keys"] if key not in lost]
        lost = {hole.sample for hole in batch["holes"]}
        assert batch["sample_ids"] == [i for i in whole["sample_ids"] if i not in lost]
        assert batch["num_targets"] <= whole["num_targets"]
        assert len(batch["cu_seqlens"]) == len(batch["sample_keys"]) + 2
    counts = {("shards", "corrupt image"): 2, ("shards", "damaged"): 1}
    assert loader.faults.counts == counts
    assert loader.faults.summary() == "2 × corrupt image in shards, 1 × damaged in shards"


def test_a_pack_of_holes_only_is_all_padding(tmp_path):
    tar = write_pictures(tmp_path, broken=range(COUNT))
    for batch in islice(open_loader([tar]), 3):
        assert batch["sample_keys"] == [] and batch["num_targets"] == 0
        assert len(batch["holes"]) == batch["place"].end - batch["place"].position > 0
        assert batch["cu_seqlens"].tolist() == [0, 128]


def test_rate_zero_stops_at_the_first_and_names_it(tmp_path):
    tar = write_pictures(tmp_path, broken=(5,))
    loader = open_loader([tar], max_bad_rate=0.0)
    with pytest.raises(ValueError, match=r"^data\.max_bad_rate: .*elsewhere\.tar: sample s5: "):
        first_epoch(loader)


# Inline, a file that is open already stays readable when its name is gone.
@pytest.mark.parametrize(("change", "num_workers"), [("cut", 0), ("cut", 1), ("gone", 1)])
def test_a_lost_shard_ends_the_run_by_name(tmp_path, change, num_workers):
    tar = write_pictures(tmp_path)
    loader = open_loader([tar], num_workers=num_workers)
    if change == "cut":
        with tar.open("r+b") as file:
            file.truncate(2000)
    else:
        tar.unlink()
    with pytest.raises(ValueError, match=r"made-elsewhere\.tar: .*its shard must stay as it is"):
        first_epoch(loader)


def test_a_sample_of_another_length_than_planned_is_a_hole(tmp_path):
    loader = open_loader([write_pictures(tmp_path)])
    planned = loader.builder.num_tokens
    planned[7] -= 3
    planned[8] += 3
    reasons = {hole.key: hole.reason for batch in first_epoch(loader) for hole in batch["holes"]}
    assert reasons == {"s7": "too long", "s8": "too short"}


def test_refused_samples_are_left_out_of_the_plan_up_to_the_rate(tmp_path):
    (tmp_path / "slim.png").write_bytes(encoded_image(2, 401, "PNG"))
    records = [chat(image="slim.png") if i == 3 else chat() for i in range(20)]
    write_shards(write_jsonl(tmp_path / "chats.jsonl", records), tmp_path / "shards")
    loader = open_loader([tmp_path / "shards"], max_bad_rate=0.05)
    assert loader.describe() == {"samples": 19, "samples refused": 1}
    keys = [key for batch in first_epoch(loader) for key in batch["sample_keys"]]
    assert len(keys) == len(set(keys)) == 19
    with pytest.raises(ValueError, match=r"sample 000000003: .*1 of 20 samples.*max_bad_rate=0.04"):
        open_loader([tmp_path / "shards"], max_bad_rate=0.04)


def test_held_out_samples_must_be_whole(tmp_path):
    tar = write_pictures(tmp_path, broken=(5,))
    with pytest.raises(ValueError, match=r"made-elsewhere\.tar: sample s5: image 0"):
        list(eval_batches([tar], tiny_processor(), 128, 0, 1))


def test_a_missing_member_is_a_reason_of_its_own():
    part = {"type": "image", "index": 1}
    record = {"messages": [{"role": "user", "content": [part]}, chat()["messages"][1]]}
    raw = RawSample("k", "a.tar: sample k", record, [encoded_image()])
    with pytest.raises(ValueError, match="image 1: must be a member") as error:
        tiny_processor().encode(raw)
    assert reason_of(error.value) == "missing member"


def test_reasons_come_from_what_an_error_was_raised_from():
    try:
        try:
            raise BadSample("no image", "corrupt image")
        except ValueError as error:
            raise ValueError("a.tar: no image") from error
    except ValueError as error:
        assert reason_of(error) == "corrupt image"
    assert reason_of(ValueError("the template refuses")) == "refused"
    assert reason_of(KeyError("x")) == "failed by KeyError"


def hole(number=0):
    return Hole(f"k{number}", "web", "corrupt image", f"a.tar: sample k{number}: broken", number)


def test_the_rate_counts_from_100_samples_on():
    faults = Faults(0.01)
    faults.add(50, [hole(), hole()])
    faults.add(49, [hole()])
    message = r"at most 0\.01 of samples .* got 4 of the last 100 \(4 × corrupt image in web\)"
    with pytest.raises(ValueError, match=message + r"; the last one: a\.tar: sample k9: broken;"):
        faults.add(1, [hole(9)])


def test_old_holes_are_forgotten_by_the_rate_but_not_by_the_counts():
    faults = Faults(0.01)
    for _ in range(100):
        faults.add(100, [hole()])  # exactly the rate
    for _ in range(WINDOW // 100):
        faults.add(100, [])
    faults.add(100, [hole()] * 99)  # would be too many on top of 100
    assert faults.counts["web", "corrupt image"] == 199
    with pytest.raises(ValueError, match=f"101 of the last {WINDOW} "):
        faults.add(100, [hole()] * 2)


def test_only_the_first_holes_of_a_kind_are_logged(caplog):
    faults = Faults(1.0)
    for number in range(30):
        faults.add(1, [hole(number)])
    faults.add(1, [Hole("x", "web", "damaged", "a.tar: sample x: other bytes", 0)])
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 12
    assert texts[0] == "left out (corrupt image): a.tar: sample k0: broken"
    assert "more in web will not be logged" in texts[10]
    assert "sample x" in texts[11]


def test_measured_lengths_know_nothing_of_holes(tmp_path):
    """A cut image is as long in the plan as a whole one: holes never move the plan."""
    whole, cut = (
        sample_lengths(Shards.open([write_pictures(tmp_path / name, broken)]), tiny_processor())
        for name, broken in (("whole", ()), ("cut", (1, 2)))
    )
    assert whole.num_tokens.tolist() == cut.num_tokens.tolist()


def test_mixture_has_no_holes(tmp_path):
    loader = open_loader(write_mixture(tmp_path), seq_len=512)
    assert not any(batch["holes"] for batch in first_epoch(loader))
