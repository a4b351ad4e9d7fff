import gzip
import importlib
import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.chats import chat, encoded_image, write_jsonl
from triptych_data.shards.mapping import Mapping
from triptych_data.shards.reader import Shards
from triptych_data.shards.write import write_shards
from triptych_data.sources.kinds import find_inputs, open_inputs

pyarrow = pytest.importorskip("pyarrow")
for module in ("ipc", "feather", "parquet"):
    importlib.import_module(f"pyarrow.{module}")

WORDS = ("a", "Größe", 'say "hi"', "x,y", "one\ntwo", "tab\tbed", "👍", "", "'", "{}", "]")


def rows_of(path: Path, scratch: Path, **options: Any) -> list[dict[str, Any]]:
    scratch.mkdir(exist_ok=True)
    rows = open_inputs(find_inputs([path], **options), scratch, any_order=False)
    return [rows.read(row) for row in range(len(rows))]


def table(count: int = 30) -> list[dict[str, Any]]:
    rng = random.Random(count)
    return [
        {"question": " ".join(rng.choices(WORDS, k=3)), "answer": f"{i} {rng.choice(WORDS)}"}
        for i in range(count)
    ]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", **how: Any) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, **how)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_arrow(path: Path, rows: list[Any], *, stream: bool = False, batch: int = 7) -> Path:
    data = pyarrow.Table.from_pylist(rows)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=batch)
    return path


def write_parquet(path: Path, rows: list[Any], group: int = 7) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_every_kind(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The same rows in every kind of file that holds tables."""
    packed = folder / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (folder / "plain.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    feather = folder / "rows.feather"
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), feather, compression="lz4")
    return [
        write_jsonl(folder / "rows.jsonl", rows),
        packed,
        folder / "rows.json",
        folder / "plain.json",
        write_csv(folder / "rows.csv", rows),
        write_csv(folder / "rows.tsv", rows, "\t", lineterminator="\n"),
        write_parquet(folder / "rows.parquet", rows),
        write_arrow(folder / "rows.arrow", rows),
        write_arrow(folder / "stream.arrow", rows, stream=True),
        feather,
    ]


def test_every_kind_of_file_gives_the_same_shards(tmp_path):
    """In order and shuffled, each kind by workers in one of the two."""
    rows = [row | {"answer": row["answer"] + "."} for row in table()]
    mapping, written = Mapping(prompt="question", response="answer"), set()
    for turn, shuffle_seed in enumerate((None, 4)):
        written.clear()
        for number, path in enumerate(write_every_kind(tmp_path, rows)):
            out = tmp_path / f"out-{shuffle_seed}-{number}"
            workers = 1 + (number + turn) % 2
            write_shards(path, out, mapping=mapping, shuffle_seed=shuffle_seed, num_workers=workers)
            written.add((out / "shard-000000.tar").read_bytes())
        assert len(written) == 1
    samples = list(Shards.open([tmp_path / "out-None-0"]))
    assert [s.json["messages"][0]["content"] for s in samples] == [r["question"] for r in rows]


def test_several_inputs_follow_each_other(tmp_path):
    rows = [{"messages": chat()["messages"], "n": i} for i in range(9)]
    first = write_jsonl(tmp_path / "a.jsonl", rows[:4])
    second = write_parquet(tmp_path / "b.parquet", rows[4:])
    for number, order in enumerate(([first, second], [second, first])):
        write_shards(order, tmp_path / f"out{number}")
    numbers = [[s.json["n"] for s in Shards.open([tmp_path / f"out{k}"])] for k in (0, 1)]
    assert numbers == [list(range(9)), [*range(4, 9), *range(4)]]
    (tmp_path / "parts").mkdir()
    write_parquet(tmp_path / "parts" / "2.parquet", rows[4:])
    write_parquet(tmp_path / "parts" / "1.parquet", rows[:4])
    for number, name in enumerate((tmp_path / "parts", tmp_path / "parts" / "*.parquet")):
        write_shards(name, tmp_path / f"parts{number}")
        assert [s.json["n"] for s in Shards.open([tmp_path / f"parts{number}"])] == numbers[0]


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": 2}')
    rows = open_inputs(find_inputs([path]), tmp_path, any_order=False)
    assert [rows.read(i) for i in range(2)] == [{"a": 1}, {"b": 2}]
    assert [rows.where(i) for i in range(2)] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize("size", [8, 64, 1 << 20])
def test_arrays_are_read_through_a_window(tmp_path, monkeypatch, size):
    monkeypatch.setattr("triptych_data.sources.jsons.WINDOW", size)
    values = [{"text": 'ü]{[,\\"' * i, "n": [i, {"m": None}]} for i in range(40)]
    for number, indent in enumerate((None, 2)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(values, ensure_ascii=number == 0, indent=indent))
        assert rows_of(path, tmp_path / f"s{number}") == values


@pytest.mark.parametrize(
    "text",
    ['{"a": 1}', '[{"a": 1}', '[{"a": 1} {"b": 2}]', '[{"a": 1},]', '[{"a": }]', "[]", "",
     '[{"a": 1}] x', '[{"a": "' + "x" * 100, '[,{"a": 1}]'],
)  # fmt: skip
def test_arrays_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: "):
        rows_of(tmp_path / "x.json", tmp_path / "scratch")


def test_csv_numbers_records_by_their_first_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('a,b\n"1\n2",3\n\n5" disk,"x ""y"""\n7\n', encoding="utf-8")
    rows = open_inputs(find_inputs([path]), tmp_path, any_order=False)
    assert [rows.read(i) for i in range(2)] == [
        {"a": "1\n2", "b": "3"},
        {"a": '5" disk', "b": 'x "y"'},
    ]
    assert [rows.where(i) for i in range(3)] == [f"{path}:{n}" for n in (2, 5, 6)]
    with pytest.raises(ValueError, match=r"x.csv:6: a row must have the 2 fields"):
        rows.read(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [('a,b\n1,"2\n3,4\n', "x.csv:2: a quoted field must close"), ("a,a\n1,2\n", "got 'a' twice"),
     ("a,b\n", "a header alone"), ("", "must hold a record")],
)  # fmt: skip
def test_broken_csv_is_named(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / "x.csv", tmp_path / "scratch")


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather", "x.jsonl.gz", "x.tar"])
def test_broken_binary_files_are_named(tmp_path, name):
    path = tmp_path / name
    whole = {
        "parquet": lambda: write_parquet(path, table()),
        "arrow": lambda: write_arrow(path, table()),
        "feather": lambda: write_arrow(path, table()),
        "gz": lambda: path.write_bytes(gzip.compress(b'{"a": 1}\n' * 999)),
        "tar": lambda: write_tar(path, {"a.txt": b"x" * 20000}),
    }
    whole[name.rpartition(".")[2]]()
    data = path.read_bytes()
    for cut in (len(data) // 2, 3, 0):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=name):
            rows_of(path, tmp_path / f"scratch{cut}")


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_images_in_tables_are_structs_bytes_or_paths(tmp_path):
    image = encoded_image(30, 20)
    (tmp_path / "a.jpg").write_bytes(image)
    struct = {"bytes": image, "path": "elsewhere.jpg"}
    kinds: dict[str, list[Any]] = {
        "struct": [struct, {"bytes": None, "path": "a.jpg"}],
        "list": [[struct, struct], [struct, {"bytes": None, "path": "a.jpg"}]],
        "bytes": [image, image],
        "path": ["a.jpg", "a.jpg"],
    }
    for name, values in kinds.items():
        rows = [{"q": "What?", "a": "A cat.", "pic": value, "size": 1.5} for value in values]
        mapping = Mapping(prompt="q", response="a", media={"image": ("pic",)})
        out = tmp_path / name
        write_shards(write_parquet(tmp_path / f"{name}.parquet", rows), out, mapping=mapping)
        for sample in Shards.open([out]):
            assert sample.media == [image] * (2 if name == "list" else 1)
            *images, text = sample.json["messages"][0]["content"]
            assert text == {"type": "text", "text": "What?"} and len(images) == len(sample.media)
            assert sample.json["size"] == 1.5 and "pic" not in sample.json


def save_to_disk(folder: Path, rows: list[Any], parts: int = 2) -> Path:
    """What `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{parts:05d}.arrow" for i in range(parts)]
    size = -(-len(rows) // parts)
    for i, name in enumerate(names):
        write_arrow(folder / name, rows[i * size : (i + 1) * size], stream=True)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_saved_datasets(tmp_path):
    image = encoded_image()
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}], "name": "me"},
    ]
    rows = [
        {"messages": turns, "images": [{"bytes": image, "path": None}], "n": i} for i in range(9)
    ]
    saved = save_to_disk(tmp_path / "saved" / "train", rows)
    write_shards(saved, tmp_path / "out", shuffle_seed=1)
    samples = list(Shards.open([tmp_path / "out"]))
    assert sorted(sample.json["n"] for sample in samples) == list(range(9))
    assert all(sample.media == [image] for sample in samples)
    index, text = samples[0].json["messages"][0]["content"]
    assert (index, text) == ({"type": "image", "index": 0}, {"type": "text", "text": "?"})
    assert set(samples[0].json["messages"][0]) == {"role", "content"}, (
        "null in the table: not there"
    )
    splits = tmp_path / "saved" / "dataset_dict.json"
    splits.write_text('{"splits": ["train"]}')
    assert len(find_inputs([tmp_path / "saved"])) == 2
    splits.write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"must be one split, got .*saved/train, .*saved/test"):
        find_inputs([tmp_path / "saved"])
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(ValueError, match=r"must name files of its own folder"):
        find_inputs([saved])


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
]


@pytest.mark.parametrize("image", ["a.jpg", ["a.jpg"]])
def test_sharegpt_with_llavas_image(tmp_path, image):
    (tmp_path / "a.jpg").write_bytes(encoded_image())
    rows = [{"id": 7, "conversations": SHAREGPT, "image": image}]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    write_shards(tmp_path / "llava.json", tmp_path / "out")
    [sample] = Shards.open([tmp_path / "out"])
    roles = [message["role"] for message in sample.json["messages"]]
    assert (roles, sample.json["id"]) == (["system", "user", "assistant"], 7)
    assert sample.json["messages"][1]["content"][0] == {"type": "image", "index": 0}
    assert len(sample.media) == 1 and "image" not in sample.json


def test_imagefolder_with_metadata(tmp_path):
    for sub in ("a", "b"):
        folder = tmp_path / "photos" / sub
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(encoded_image(9, 9, "PNG"))
        rows = [{"file_name": "1.png", "text": f"In {sub}."}]
        write_jsonl(folder / "metadata.jsonl", rows) if sub == "a" else write_csv(
            folder / "metadata.csv", rows
        )
    mapping = Mapping(prompt_template="Describe it.")
    write_shards(tmp_path / "photos", tmp_path / "out", mapping=mapping)
    first, second = Shards.open([tmp_path / "out"])
    image, text = first.json["messages"][0]["content"]
    assert text["text"] == "Describe it." and image == {"type": "image", "index": 0}
    answers = [sample.json["messages"][-1]["content"] for sample in (first, second)]
    assert sorted(answers) == ["In a.", "In b."]


def test_media_with_texts_beside_them(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.jpg").write_bytes(encoded_image(5, 5))
    (folder / "b.txt").write_text("Second.\n")
    (folder / "deep" / "c.png").write_bytes(encoded_image(6, 6, "PNG"))
    (folder / "deep" / "c.json").write_text('{"caption": "Third.", "licence": "CC0"}')
    (folder / "a.webp").write_bytes(encoded_image(4, 4, "WEBP"))
    (folder / "a.caption").write_text("First.")
    (folder / "lonely.jpg").write_bytes(encoded_image())
    (folder / "README.md").write_text("no sample")
    write_shards(folder, tmp_path / "out")
    samples = list(Shards.open([tmp_path / "out"]))
    answers = [sample.json["messages"][-1]["content"] for sample in samples]
    assert answers == ["First.", "Second.", "Third."]
    assert samples[0].json["messages"][0]["content"] == [{"type": "image", "index": 0}]
    assert samples[2].json["licence"] == "CC0"


def test_foreign_tars(tmp_path):
    import webdataset

    image = encoded_image()
    with webdataset.TarWriter(str(tmp_path / "x-000.tar")) as tar:
        for i in range(5):
            caption = {"caption": f"Picture {i}.", "width": 24}
            sample: dict[str, Any] = {"__key__": f"dir/{i:03d}", "jpg": image}
            tar.write(sample | ({"json": caption} if i % 2 else {"txt": f"Picture {i}."}))
    write_shards(tmp_path / "x-000.tar", tmp_path / "out", shuffle_seed=0, num_workers=2)
    samples = sorted(Shards.open([tmp_path / "out"]), key=lambda sample: sample.json["id"])
    assert [sample.json["id"] for sample in samples] == [f"dir/{i:03d}" for i in range(5)]
    assert [sample.json["messages"][-1]["content"] for sample in samples] == [
        f"Picture {i}." for i in range(5)
    ]
    assert all(sample.media == [image] for sample in samples)
    assert samples[1].json["width"] == 24


def test_foreign_tars_with_several_images_and_texts(tmp_path):
    files = {
        "1.before.png": encoded_image(4, 4, "PNG"), "1.after.png": encoded_image(5, 5, "PNG"),
        "1.ask.txt": b"What changed?", "1.say.txt": b"The size.", "1.pickle": b"\x80\x04.",
    }  # fmt: skip
    tar = write_tar(tmp_path / "x.tar", files)
    media = {"image": ("after.png", "before.png")}
    write_shards(
        tar,
        tmp_path / "out",
        mapping=Mapping(prompt="ask.txt", response="say.txt", media=media),
    )
    [sample] = Shards.open([tmp_path / "out"])
    assert sample.media == [files["1.after.png"], files["1.before.png"]]
    assert sample.json["messages"][0]["content"][2]["text"] == "What changed?"
    assert set(sample.json) == {"messages", "id"}


def test_our_layout_in_a_tar_without_index(tmp_path):
    small, large = encoded_image(4, 4, "PNG"), encoded_image(8, 8)
    content = [{"type": "image", "index": 1}, {"type": "text", "text": "and"},
               {"type": "image", "index": 0}]  # fmt: skip
    record = {"messages": [{"role": "user", "content": content}, chat()["messages"][1]]}
    files = {"a.json": json.dumps(record).encode(), "a.0.jpg": large, "a.1.png": small}
    write_shards(write_tar(tmp_path / "x.tar", files), tmp_path / "out")
    [sample] = Shards.open([tmp_path / "out"])
    assert sample.media == [small, large], "numbered anew as the text meets them"


def test_tars_with_a_key_that_comes_back_are_refused(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.txt": b"1", "b.txt": b"2", "a.jpg": encoded_image()})
    with pytest.raises(ValueError, match=r"x\.tar: byte \d+: members of one sample must lie side"):
        rows_of(tar, tmp_path / "scratch")


def test_what_is_there_is_named_when_a_column_is_not(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [{"q": "?", "a": "!"}])
    cases = {
        r"x.jsonl:1: a row must hold a chat or a document, got the columns a, q; name": Mapping(),
        r"x.jsonl:1: a row must have the column b, got a, q": Mapping(prompt="q", response="b"),
        r"x.jsonl:1: a row must have the column c": Mapping(prompt_template="{c}?", response="a"),
    }
    for message, mapping in cases.items():
        with pytest.raises(ValueError, match=message):
            write_shards(source, tmp_path / "out", mapping=mapping)
    with pytest.raises(ValueError, match="--messages: must stand alone"):
        Mapping(messages="m", prompt="p", response="r")


def test_templates_take_columns_and_system_and_types(tmp_path):
    rows = [{"topic": "tides", "n": 3, "a": 12, "rule": "Count."}]
    mapping = Mapping(prompt_template="{n} facts on {topic}?", response="a", system="rule")
    write_shards(write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "out", mapping=mapping)
    [sample] = Shards.open([tmp_path / "out"])
    assert [message["content"] for message in sample.json["messages"]] == [
        "Count.", "3 facts on tides?", "12",
    ]  # fmt: skip
    assert sample.json["topic"] == "tides"


def test_values_that_json_lacks_are_kept_as_text_or_null(tmp_path):
    import datetime
    import decimal

    rows = [
        {"q": "?", "a": "!", "at": datetime.datetime(2026, 1, 2), "x": float("nan"),
         "d": decimal.Decimal("1.50"), "raw": b"\xff"}
    ]  # fmt: skip
    write_shards(
        write_parquet(tmp_path / "x.parquet", rows),
        tmp_path / "out",
        mapping=Mapping(prompt="q", response="a"),
    )
    [sample] = Shards.open([tmp_path / "out"])
    kept = {name: value for name, value in sample.json.items() if name != "messages"}
    assert kept == {"at": "2026-01-02 00:00:00", "x": None, "d": "1.50"}


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat()])
    write_csv(tmp_path / "b.csv", table(2))
    with pytest.raises(ValueError, match="must hold files of one kind, got csv, jsonl"):
        find_inputs([tmp_path])
    assert find_inputs([tmp_path], "jsonl") == [(tmp_path / "a.jsonl", "jsonl")]
    (tmp_path / "x.zip").touch()
    with pytest.raises(ValueError, match=r"x.zip: the name must end in one of \.arrow, \.csv"):
        find_inputs([tmp_path / "x.zip"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder must hold shards, tables, metadata"):
        rows_of(tmp_path / "empty", tmp_path / "scratch")


def test_parquet_is_read_a_row_group_at_a_time_in_order(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", table(30), group=7)
    rows = open_inputs(find_inputs([path]), tmp_path, any_order=False)
    assert rows.pieces(256).tolist() == [0, 7, 14, 21, 28]
    order = np.random.default_rng(0).permutation(30)
    assert [rows.read(i) for i in order] == [table(30)[i] for i in order]
    assert not list(tmp_path.glob("0*")), "nothing is copied"


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", table(3))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'triptych-data\[parquet\]'"):
        rows_of(path, tmp_path / "scratch")


def test_links_out_of_the_folder_are_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(encoded_image())
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "up").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.jpg")
    cases = {
        "link.jpg": "must lie in",
        "up/secret.jpg": "must lie in",
        "../secret.jpg": "must lie in",
        str(tmp_path / "secret.jpg"): "must lie in",
        f"file://{tmp_path}/secret.jpg": "must lie in",
        "file://..%2Fsecret.jpg": "must lie in",
        "pipe.jpg": "must be a regular file",
        "/dev/zero": "must lie in",
        "pipe:cat /etc/passwd": "nothing is fetched or run",
        "https://x.org/a.jpg": "nothing is fetched or run",
        "s3://bucket/a.jpg": "nothing is fetched or run",
        "\0" + "0": "a null byte",
    }
    for path, message in cases.items():
        source = write_jsonl(root / "x.jsonl", [chat(image=path)])
        with pytest.raises(ValueError, match=message):
            write_shards(source, tmp_path / "out")
    outside = {"link.jpg", "up/secret.jpg", "../secret.jpg", str(tmp_path / "secret.jpg")}
    for number, path in enumerate(sorted(outside)):
        source = write_jsonl(root / "x.jsonl", [chat(image=path)])
        report = write_shards(source, tmp_path / f"out{number}", allow_outside=True)
        assert report.num_images == 1
    source = write_jsonl(root / "x.jsonl", [chat(image="/dev/zero")])
    with pytest.raises(ValueError, match="must be a regular file"):
        write_shards(source, tmp_path / "out", allow_outside=True)


def test_video_and_audio_in_tars_tables_and_folders(tmp_path):
    pytest.importorskip("av")
    from tests.data.media import clip, sound

    video, audio = clip(12), sound(0.5)
    files = {"1.mp4": video, "1.json": b'{"caption": "Bars."}', "2.wav": audio, "2.txt": b"A tone."}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rows = [
        {"q": "What is seen?", "a": "Bars.", "clip": {"bytes": video, "path": None}, "sound": None},
        {"q": "And heard?", "a": "A tone.", "clip": None, "sound": {"bytes": audio, "path": "x"}},
    ]
    mapping = Mapping(prompt="q", response="a", media={"video": ("clip",), "audio": ("sound",)})
    sources: list[tuple[Path, Mapping]] = [
        (write_tar(tmp_path / "x.tar", files), Mapping()),
        (folder, Mapping()),
        (write_parquet(tmp_path / "x.parquet", rows), mapping),
    ]
    for number, (source, how) in enumerate(sources):
        report = write_shards(source, tmp_path / f"out{number}", mapping=how)
        assert (report.num_samples, report.num_videos, report.num_audios) == (2, 1, 1)
        opened = Shards.open(report.shards)
        assert [sample.media for sample in opened] == [[video], [audio]]
        assert opened.media.frames.tolist() == [12, 0]
        assert opened.media.seconds.tolist() == [pytest.approx(0.5), pytest.approx(0.5)]
        answers = [sample.json["messages"][-1]["content"] for sample in opened]
        assert answers == ["Bars.", "A tone."]


def test_sharegpt_places_media_of_several_kinds(tmp_path):
    pytest.importorskip("av")
    from tests.data.media import clip

    (tmp_path / "a.mp4").write_bytes(clip(12))
    (tmp_path / "a.jpg").write_bytes(encoded_image())
    turns = [
        {"from": "human", "value": "<image> first, then <video>."},
        {"from": "gpt", "value": "Seen."},
    ]
    rows = [{"conversations": turns, "images": ["a.jpg"], "videos": ["a.mp4"]}]
    write_shards(write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "out")
    [sample] = Shards.open([tmp_path / "out"])
    content = sample.json["messages"][0]["content"]
    assert [part.get("index", part.get("text")) for part in content] == [0, " first, then ", 1, "."]
    assert sample.media == [(tmp_path / name).read_bytes() for name in ("a.jpg", "a.mp4")]


def test_a_chat_within_a_cell_is_read(tmp_path):
    """CSV has only text: turns, and lists of images, are JSON in a cell."""
    (tmp_path / "a.jpg").write_bytes(encoded_image())
    turns = json.dumps(
        [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "!"}]
    )
    source = write_csv(tmp_path / "x.csv", [{"talk": turns, "images": '["a.jpg", "a.jpg"]'}])
    write_shards(source, tmp_path / "out", mapping=Mapping(messages="talk"))
    [sample] = Shards.open([tmp_path / "out"])
    assert len(sample.media) == 2 and set(sample.json) == {"messages"}


def test_parts_and_files_must_be_as_many(tmp_path):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "!"}]
    source = write_jsonl(tmp_path / "x.jsonl", [{"messages": turns, "images": ["a.jpg"]}])
    with pytest.raises(ValueError, match="one image part for each image, got 2 parts and 1 files"):
        write_shards(source, tmp_path / "out")
