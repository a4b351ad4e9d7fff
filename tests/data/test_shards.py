import base64
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.chats import chat, encoded_image, make_shards, write_chats, write_jsonl
from triptych_data.shards.reader import Shards
from triptych_data.shards.tar import END
from triptych_data.shards.write import check_records, write_shards


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_workers_nor_on_the_run(tmp_path):
    source = write_chats(tmp_path, count=40)
    written = []
    for run, workers in enumerate([1, 3, 1]):
        folder = tmp_path / f"run{run}"
        write_shards(source, folder, samples_per_shard=9, num_workers=workers, shuffle_seed=5)
        written.append(contents(folder))
    assert len(written[0]) == 3 * 5, "five shards, each with .idx and .columns"
    assert written[0] == written[1] == written[2]


def test_webdataset_reads_the_same_samples(tmp_path):
    make_shards(tmp_path)
    paths = [str(path) for path in sorted((tmp_path / "shards").glob("*.tar"))]
    records = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    seen = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in seen] == [f"{i:09d}" for i in range(12)]
    for i, (sample, record) in enumerate(zip(seen, records, strict=True)):
        stored = json.loads(sample["json"])
        assert stored["messages"][-1] == record["messages"][-1]
        media = sorted(name for name in sample if name[0].isdigit())
        suffix = ("jpg", "png", "webp")[i % 3]
        assert media == [f"{m}.{suffix}" for m in range([0, 1, 2, 2][i % 4])]
        for name in media:
            assert sample[name] == (tmp_path / "images" / f"{i}.{suffix}").read_bytes()


def test_our_reader_reads_what_webdataset_reads(tmp_path):
    report = make_shards(tmp_path)
    theirs = webdataset.WebDataset([str(path) for path in report.shards], shardshuffle=False)
    for ours, sample in zip(Shards.open(report.shards), theirs, strict=True):
        assert ours.key == sample["__key__"]
        assert ours.json == json.loads(sample["json"])
        assert ours.media == [sample[name] for name in sorted(sample) if name[0].isdigit()]


def test_headers_hold_nothing_of_this_machine(tmp_path):
    report = make_shards(tmp_path, count=4)
    with tarfile.open(report.shards[0]) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert member.uname == member.gname == ""


def test_a_shard_ends_before_it_would_grow_beyond_its_size(tmp_path):
    source = write_chats(tmp_path, count=30)
    report = write_shards(source, tmp_path / "shards", shard_size=12_000)
    assert len(report.shards) > 3
    sizes = [path.stat().st_size for path in report.shards]
    assert max(sizes) <= 12_000 and sum(sizes) == report.tar_bytes
    for shard, following in zip(report.shards, report.shards[1:], strict=False):
        first = np.diff(Shards.open([following]).indexes[0].sample_start)[0]
        assert shard.stat().st_size + first > 12_000


def test_a_sample_larger_than_a_shard_gets_its_own(tmp_path):
    report = write_shards(write_chats(tmp_path, 6), tmp_path / "shards", shard_size=1)
    assert [Shards.open([shard]).num_samples for shard in report.shards] == [1] * 6


def test_report_counts(tmp_path):
    report = make_shards(tmp_path)
    shards = Shards.open([tmp_path / "shards"])
    assert report.num_samples == shards.num_samples == 12
    assert report.num_images == len(shards.media.kind) == 3 * (1 + 2 + 2)
    assert report.text_bytes == shards.text_bytes.sum()
    assert [path.name for path in report.shards] == [f"shard-{i:06d}.tar" for i in range(3)]


def test_shuffle_permutes_by_the_seed(tmp_path):
    source = write_chats(tmp_path, count=20)
    answers = {}
    for seed in (None, 0, 1):
        report = write_shards(source, tmp_path / f"s{seed}", shuffle_seed=seed)
        shards = Shards.open(report.shards)
        assert [shards.keys(i) for i in range(3)] == [f"{i:09d}" for i in range(3)]
        answers[seed] = [sample.json["messages"][-1]["content"] for sample in shards]
    assert answers[None] != answers[0] != answers[1] != answers[None]
    assert sorted(answers[None]) == sorted(answers[0]) == sorted(answers[1])


def test_all_ways_to_name_an_image(tmp_path):
    image = encoded_image(30, 20)
    (tmp_path / "with space.jpeg").write_bytes(image)
    uri = "data:image/jpeg;base64," + base64.b64encode(image).decode()
    absolute = str(tmp_path / "with space.jpeg")
    escaped = f"file://{tmp_path}/with%20space.jpeg"
    names = ["with space.jpeg", absolute, escaped, uri]
    source = write_jsonl(tmp_path / "x.jsonl", [chat(image=name) for name in names])
    shards = Shards.open(write_shards(source, tmp_path / "shards").shards)
    assert [sample.media for sample in shards] == [[image]] * 4


def test_media_root_is_where_relative_paths_start(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded_image())
    (tmp_path / "elsewhere").mkdir()
    source = write_jsonl(tmp_path / "elsewhere" / "x.jsonl", [chat(image="a.jpg")])
    report = write_shards(source, tmp_path / "shards", media_root=tmp_path)
    assert report.num_images == 1


def test_suffix_and_size_come_from_the_content(tmp_path):
    (tmp_path / "wrong.jpg").write_bytes(encoded_image(5, 7, "PNG"))
    (tmp_path / "turned.jpg").write_bytes(encoded_image(40, 10, orientation=6))
    records = [chat(image="wrong.jpg"), chat(image="turned.jpg")]
    report = write_shards(write_jsonl(tmp_path / "x.jsonl", records), tmp_path / "shards")
    index = Shards.open(report.shards).indexes[0]
    assert [index.suffixes[code] for code in index.member_suffix] == ["json", "png", "json", "jpg"]
    assert index.media_size.tolist() == [[5, 7], [10, 40]], "EXIF orientation 6 lies on its side"


def broken(tmp_path: Path) -> dict[str, object]:
    """Bad records by what the error must say."""
    image = encoded_image(64, 64)
    (tmp_path / "cut.jpg").write_bytes(image[: len(image) // 2])
    (tmp_path / "cut.png").write_bytes(encoded_image(64, 64, "PNG")[:-40])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "other.jpg").write_bytes(encoded_image(8, 8, "GIF"))
    return {
        "missing.jpg": chat(image="missing.jpg"),
        "cut.jpg: an image must be a whole": chat(image="cut.jpg"),
        "cut.png: an image must be a whole": chat(image="cut.png"),
        "text.jpg: an image must be a whole": chat(image="text.jpg"),
        "empty.jpg: an image must be a whole": chat(image="empty.jpg"),
        "other.jpg: an image must be a whole": chat(image="other.jpg"),
        "(Is a directory)": chat(image="."),
        "(File name too long)": chat(image="x" * 300),
        "null byte": chat(image="a\0b"),
        "download it first": chat(image="https://example.com/a.jpg"),
        "a medium must lie in": chat(image="/etc/passwd"),
        "no ;base64": chat(image="data:image/png,abc"),
        "a data: URI must be": chat(image="data:image/png;base64,a*b"),
        "must be valid JSON": '{"messages": [',
        "messages must be a non-empty list": {"messages": []},
        "role must be one of": {"messages": [{"role": "bot", "content": "hi"}]},
        "must not hold <image>": {"messages": [{"role": "user", "content": "<image>?"}]},
    }


def test_a_bad_line_is_named_and_nothing_is_written(tmp_path):
    for message, record in broken(tmp_path).items():
        source = write_jsonl(tmp_path / "x.jsonl", [chat(), "", chat(), record, chat()])
        with pytest.raises(ValueError) as error:
            write_shards(source, tmp_path / "shards", samples_per_shard=1)
        assert str(error.value).startswith(f"{source}:4: ")
        assert message in str(error.value)
        assert list((tmp_path / "shards").iterdir()) == []


def test_a_bad_line_is_found_by_workers_too(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [chat()] * 30 + [{"messages": []}] + [chat()] * 30)
    with pytest.raises(ValueError, match=r"x\.jsonl:31: messages"):
        write_shards(source, tmp_path / "shards", num_workers=2)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [".partial"]


def test_bad_records_are_listed_with_their_reasons(tmp_path):
    bad = list(broken(tmp_path).values())
    records = [record for b in bad for record in (chat(), b)]
    source = write_jsonl(tmp_path / "x.jsonl", records)
    report = write_shards(source, tmp_path / "shards", max_bad=0.5, shuffle_seed=1)
    assert report.num_samples == len(bad)
    assert [skipped.row for skipped in report.skipped] == list(range(1, 2 * len(bad), 2))
    listed = (tmp_path / "shards" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"] for line in listed] == [s.error for s in report.skipped]
    assert json.loads(listed[0])["reason"] == report.skipped[0].reason
    reasons = report.skipped_reasons
    assert sum(reasons.values()) == len(bad)
    assert reasons["an image must be a whole JPEG, PNG or WebP file"] == 5
    assert reasons["a medium must be a readable file"] == 4
    keys = [sample.key for sample in Shards.open([tmp_path / "shards"])]
    assert keys == [f"{i:09d}" for i in range(len(bad))]


@pytest.mark.parametrize(
    ("max_bad", "bad", "enough"), [(3, 3, True), (2, 3, False), (0.1, 3, True)]
)
def test_there_is_a_limit_to_bad_records(tmp_path, max_bad, bad, enough):
    records = [chat()] * (30 - bad) + [{"messages": []}] * (bad - 1) + ["{"]
    source = write_jsonl(tmp_path / "x.jsonl", records)
    if enough:
        assert len(write_shards(source, tmp_path / "out", max_bad=max_bad).skipped) == bad
        return
    with pytest.raises(ValueError, match=r"at most 2 of 30 .* got 3 \(2 × messages must be a non"):
        write_shards(source, tmp_path / "out", max_bad=max_bad)


def test_nothing_good_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [{"messages": []}])
    with pytest.raises(ValueError, match=r"at most 0 of 1 records may be bad|x.jsonl:1"):
        write_shards(source, tmp_path / "shards", max_bad=0.5)
    with pytest.raises(ValueError, match="must hold a good record, got 1 bad ones"):
        write_shards(source, tmp_path / "shards", max_bad=1)
    with pytest.raises(ValueError, match="must hold a record, got none"):
        write_shards(write_jsonl(tmp_path / "empty.jsonl", []), tmp_path / "shards")
    with pytest.raises(ValueError, match="must be a file, a folder or a glob"):
        write_shards(tmp_path / "nowhere.jsonl", tmp_path / "shards")


def test_overwrite_replaces_shards_and_nothing_else(tmp_path):
    make_shards(tmp_path)
    output = tmp_path / "shards"
    (output / "notes.txt").write_text("mine")
    (output / "mine.tar").write_bytes(END)
    source = write_chats(tmp_path, count=4)
    before = contents(output)
    with pytest.raises(ValueError, match=r"must be empty, got 11 entries such as mine.tar"):
        write_shards(source, output)
    with pytest.raises(ValueError, match=r"x\.jsonl:1"):
        write_shards(write_jsonl(tmp_path / "x.jsonl", ["{"]), output, overwrite=True)
    assert contents(output) == before, "a run that fails leaves the old shards alone"
    write_shards(source, output, overwrite=True)
    left = [
        "mine.tar",
        "notes.txt",
        *(f"shard-000000.tar{end}" for end in ("", ".columns", ".idx")),
    ]
    assert sorted(contents(output)) == left
    assert Shards.open([output / "shard-000000.tar"]).num_samples == 4


def test_progress_is_told_of_both_passes(tmp_path):
    calls = []
    source = write_chats(tmp_path, count=5)
    options = {"samples_per_shard": 2, "on_progress": lambda *call: calls.append(call)}
    write_shards(source, tmp_path / "shards", **options)
    assert calls == [("Checking", 5, 5), *(("Writing", i, 3) for i in (1, 2, 3))]


def test_a_dry_run_says_what_would_be_written(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [chat(), "{", chat(), chat()])
    options = {"samples_per_shard": 2, "max_bad": 1}
    would = check_records(source, **options)
    report = write_shards(source, tmp_path / "out", **options)
    assert [path.name for path in report.shards] == [str(path) for path in would.shards]
    would.shards = report.shards
    assert would == report


def stopped_run(source: Path, output: Path, after: int, **options: object) -> None:
    """A run that ends when `after` shards are written."""

    def stop(title: str, done: int, _total: int) -> None:
        if (title, done) == ("Writing", after):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(source, output, on_progress=stop, **options)


def test_a_stopped_run_goes_on_and_says_what_it_kept(tmp_path):
    source, options = write_chats(tmp_path, count=40), {"samples_per_shard": 9, "shuffle_seed": 3}
    whole = write_shards(source, tmp_path / "whole", **options)
    stopped_run(source, tmp_path / "out", 3, **options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]
    report = write_shards(source, tmp_path / "out", **options)
    assert (report.kept_records, report.kept_shards) == (40, 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert report.num_samples == whole.num_samples


def test_a_damaged_shard_is_not_kept(tmp_path):
    source, options = write_chats(tmp_path, count=40), {"samples_per_shard": 9}
    write_shards(source, tmp_path / "whole", **options)
    for position in (600, -300, -1100):
        stopped_run(source, tmp_path / "out", 3, overwrite=True, **options)
        shard = tmp_path / "out" / ".partial" / "shards" / "shard-000001.tar"
        data = bytearray(shard.read_bytes())
        data[position] ^= 1
        shard.write_bytes(data)
        report = write_shards(source, tmp_path / "out", overwrite=True, **options)
        assert report.kept_shards == 2
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_command_does_not_go_on(tmp_path):
    source, options = write_chats(tmp_path, count=40), {"samples_per_shard": 9}
    stopped_run(source, tmp_path / "out", 3, **options)
    with pytest.raises(ValueError, match=r"shuffle_seed must be that of the unfinished run, got 1"):
        write_shards(source, tmp_path / "out", shuffle_seed=1, **options)
    with source.open("a") as file:
        file.write(json.dumps(chat()) + "\n")
    with pytest.raises(ValueError, match=r"inputs must be that .* keep its 3 finished shards"):
        write_shards(source, tmp_path / "out", **options)
    assert write_shards(source, tmp_path / "out", overwrite=True, **options).num_samples == 41


def test_what_changes_between_the_passes_is_an_error(tmp_path):
    source, options = write_chats(tmp_path, count=40), {"samples_per_shard": 9}
    stopped_run(source, tmp_path / "out", 3, **options)
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(encoded_image(300, 300))
    with pytest.raises(ValueError, match=r"chats.jsonl:\d+: a record and its media must stay"):
        write_shards(source, tmp_path / "out", **options)


@pytest.mark.parametrize("moved", [0, 1, 4, 15])
def test_a_run_killed_while_its_files_move_goes_on(tmp_path, moved):
    source, options = write_chats(tmp_path, count=40), {"samples_per_shard": 9}
    write_shards(source, tmp_path / "whole", **options)
    stopped_run(source, tmp_path / "out", 5, **options)
    partial = tmp_path / "out" / ".partial"
    (partial / "publishing").touch()
    for path in sorted((partial / "shards").iterdir())[:moved]:
        path.rename(tmp_path / "out" / path.name)
    report = write_shards(source, tmp_path / "out", **options)
    assert (report.num_samples, len(report.shards)) == (40, 5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_one_run_at_a_time_writes_in_a_folder(tmp_path):
    source = write_chats(tmp_path, count=4)

    def write_too(*_: object) -> None:
        with pytest.raises(ValueError, match="one run at a time must write here"):
            write_shards(source, tmp_path / "out")

    write_shards(source, tmp_path / "out", on_progress=write_too)
    assert Shards.open([tmp_path / "out"]).num_samples == 4


@pytest.mark.parametrize("option", ["shard_size", "samples_per_shard", "num_workers"])
def test_options_must_be_positive(tmp_path, option):
    with pytest.raises(ValueError, match="must be at least 1"):
        write_shards(write_chats(tmp_path, 1), tmp_path / "shards", **{option: 0})
