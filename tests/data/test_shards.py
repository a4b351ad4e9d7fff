import base64
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.chats import chat, encoded_image, make_shards, write_chats, write_jsonl
from triptych_data.intake import scan_lines
from triptych_data.reader import Shards
from triptych_data.shards import write_shards
from triptych_data.tar import END


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


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": 2}')
    lines = scan_lines(path)
    assert lines.number.tolist() == [1, 4]
    assert [path.read_bytes()[s:e] for s, e in zip(lines.start, lines.end, strict=True)] == [
        b'\xef\xbb\xbf{"a": 1}\r\n',
        b'{"b": 2}',
    ]


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


def test_image_root_is_where_relative_paths_start(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded_image())
    (tmp_path / "elsewhere").mkdir()
    source = write_jsonl(tmp_path / "elsewhere" / "x.jsonl", [chat(image="a.jpg")])
    report = write_shards(source, tmp_path / "shards", image_root=tmp_path)
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
    assert list((tmp_path / "shards").iterdir()) == []


def test_skip_bad_lists_what_it_left_out(tmp_path):
    bad = list(broken(tmp_path).values())
    records = [record for b in bad for record in (chat(), b)]
    source = write_jsonl(tmp_path / "x.jsonl", records)
    report = write_shards(source, tmp_path / "shards", skip_bad=True, shuffle_seed=1)
    assert report.num_samples == len(bad)
    assert [skipped.line for skipped in report.skipped] == list(range(2, 2 * len(bad) + 1, 2))
    listed = (tmp_path / "shards" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in listed] == [s._asdict() for s in report.skipped]
    keys = [sample.key for sample in Shards.open([tmp_path / "shards"])]
    assert keys == [f"{i:09d}" for i in range(len(bad))]


def test_nothing_good_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [{"messages": []}])
    with pytest.raises(ValueError, match=r"must hold a good line, got none; first: .*x.jsonl:1"):
        write_shards(source, tmp_path / "shards", skip_bad=True)
    with pytest.raises(ValueError, match="must hold a record, got none"):
        write_shards(write_jsonl(tmp_path / "empty.jsonl", []), tmp_path / "shards")
    with pytest.raises(ValueError, match="must be a JSONL file, got no file"):
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


def test_what_a_killed_run_left_is_named_and_overwritten(tmp_path):
    source = write_chats(tmp_path, count=4)
    (tmp_path / "shards" / ".partial").mkdir(parents=True)
    (tmp_path / "shards" / ".partial" / "shard-000000.tar").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"such as .partial \(of a run that was killed"):
        write_shards(source, tmp_path / "shards")
    write_shards(source, tmp_path / "shards", overwrite=True)
    assert Shards.open([tmp_path / "shards"]).num_samples == 4
    assert not (tmp_path / "shards" / ".partial").exists()


def test_progress_is_told_line_by_line(tmp_path):
    calls = []
    source = write_chats(tmp_path, count=5)
    write_shards(source, tmp_path / "shards", on_progress=lambda *call: calls.append(call))
    assert calls == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize("option", ["shard_size", "samples_per_shard", "num_workers"])
def test_options_must_be_positive(tmp_path, option):
    with pytest.raises(ValueError, match="must be at least 1"):
        write_shards(write_chats(tmp_path, 1), tmp_path / "shards", **{option: 0})
