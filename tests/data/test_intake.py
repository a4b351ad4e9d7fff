import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.chats import chat, encoded_image, write_jsonl
from triptych_data.shards.checked import Checked
from triptych_data.shards.intake import BAD, MEASURES, Intake, Rejected, reason
from triptych_data.shards.mapping import Mapping
from triptych_data.shards.tarwriter import cut, span_bytes
from triptych_data.sources.kinds import find_inputs, open_inputs

WIDTH = len(MEASURES)


def intake(source: Path, **options: object) -> Intake:
    scratch = source.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return Intake(
        open_inputs(find_inputs([source]), scratch, any_order=False), Mapping(), **options
    )


def test_a_row_is_measured_as_it_will_be_written(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded_image())
    source = write_jsonl(tmp_path / "x.jsonl", [chat(image="a.jpg"), "{", chat(answer="ü")])
    rows = intake(source)
    table, rejected = rows.measure(np.arange(3))
    sample = rows.prepare(0, decode=False)
    size = span_bytes([len(sample.json), len(encoded_image())])
    assert table[0].tolist() == [size, len("What is this?A cat."), 1, 0, 0]
    assert table[1, 0] == BAD and [entry.row for entry in rejected] == [1]
    assert table[2, 1] == len("What is this?ü".encode())
    assert "\n" not in rejected[0].error and rejected[0].error.startswith(f"{source}:2: ")


def test_headers_alone_do_not_show_damage_behind_them(tmp_path):
    image = encoded_image(300, 300)
    (tmp_path / "cut.jpg").write_bytes(image[:-200])
    source = write_jsonl(tmp_path / "x.jsonl", [chat(image="cut.jpg")])
    assert len(intake(source).measure(np.arange(1))[1]) == 1
    assert len(intake(source, decode=False).measure(np.arange(1))[1]) == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("a/x.jsonl:3: image c.jpg: an image must be whole, got 3; x", "an image must be whole"),
        ("x.jsonl:3: messages[12].content[0] must be x, got 3", "messages[].content[] must be x"),
        ("x.parquet: row 7: a row must have column b, got a; x", "a row must have column b"),
    ],
)  # fmt: skip
def test_reasons_are_the_same_for_rows_of_a_kind(error, expected):
    assert reason(error) == expected


def rows(*sizes: int) -> np.ndarray:
    table = np.ones((len(sizes), WIDTH), dtype=np.int64)
    table[:, 0] = sizes
    return table


def test_what_was_checked_is_there_again(tmp_path):
    checked = Checked(tmp_path / "checked", WIDTH)
    checked.add(rows(512, BAD), [Rejected(1, "x: ü")])
    checked.add(rows(1024), [])
    checked.close()
    again = Checked(tmp_path / "checked", WIDTH)
    assert (again.count, again.rejected) == (3, [Rejected(1, "x: ü")])
    again.add(rows(BAD), [Rejected(3, "y")])
    assert again.table()[:, 0].tolist() == [512, BAD, 1024, BAD]


@pytest.mark.parametrize("torn", [b"\1", b"\1" * (8 * WIDTH - 1), bytes(8 * WIDTH * 3)])
def test_half_a_row_and_rows_never_written_do_not_count(tmp_path, torn):
    checked = Checked(tmp_path / "checked", WIDTH)
    checked.add(rows(512, 1024), [])
    checked.close()
    with (tmp_path / "checked").open("ab") as file:
        file.write(torn)
    again = Checked(tmp_path / "checked", WIDTH)
    assert again.count == 2
    again.add(rows(2048), [])
    assert again.table()[:, 0].tolist() == [512, 1024, 2048]


def test_a_bad_row_written_before_its_table_does_not_count(tmp_path):
    checked = Checked(tmp_path / "checked", WIDTH)
    checked.add(rows(512), [])
    checked.close()
    (tmp_path / "checked.bad").write_text(json.dumps(Rejected(1, "x")) + "\n")
    again = Checked(tmp_path / "checked", WIDTH)
    assert (again.count, again.rejected) == (1, [])
    again.add(rows(BAD), [Rejected(1, "x")])
    again.close()
    assert Checked(tmp_path / "checked", WIDTH).rejected == [Rejected(1, "x")]


def test_a_lost_list_of_bad_rows_begins_anew(tmp_path):
    checked = Checked(tmp_path / "checked", WIDTH)
    checked.add(rows(512, BAD), [Rejected(1, "x")])
    checked.close()
    (tmp_path / "checked.bad").write_text("")
    assert Checked(tmp_path / "checked", WIDTH).count == 0


def test_cuts_depend_on_sizes_alone():
    sizes = np.array([1024, 1024, 5120, 512, 512, 512, 512])
    assert cut(sizes, 3 * 1024, None).tolist() == [0, 2, 3, 7]
    assert cut(sizes, 3 * 1024, 2).tolist() == [0, 2, 3, 5, 7]
    assert cut(sizes, 1, None).tolist() == list(range(8))
    assert cut(sizes, 1 << 40, None).tolist() == [0, 7]
