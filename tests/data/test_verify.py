import json
import os
from pathlib import Path

import pytest

from tests.data.chats import make_shards
from tests.data.webserver import serving
from triptych_data.shards.index import index_paths, read_index
from triptych_data.shards.verify import VerifyReport, verify_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(tmp_path)
    return tmp_path / "shards"


def found(report: VerifyReport) -> list[tuple[str, str]]:
    return [(problem.kind, Path(problem.path).name) for problem in report.problems]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_sound_shards_are_all_checked(folder):
    calls = []
    report = verify_shards(folder, on_progress=lambda *call: calls.append(call))
    assert report.ok and report.num_shards == 3 and report.num_samples == 12
    assert report.tar_bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert list(report.lines()) == [
        f"3 shards, 12 samples, {report.tar_bytes:,} bytes: all as they were indexed"
    ]


def test_flipped_samples_are_named_by_key(folder):
    tar = folder / "shard-000001.tar"
    starts = read_index(tar).sample_start.tolist()
    for row in (1, 3):
        flip(tar, starts[row] + 520)
    report = verify_shards(folder, num_workers=2)
    assert found(report) == [("flipped", "shard-000001.tar")]
    assert report.problems[0].samples == ("000000006", "000000008")
    assert "sample 000000006 and 1 more must be as indexed" in report.problems[0].message
    assert report.num_damaged == 2
    lines = list(report.lines())
    assert lines[0].startswith(f"flipped: {tar}: sample 000000006")
    assert lines[-1].endswith("1 problems, 2 damaged samples")
    assert json.loads(json.dumps(report.as_dict()))["problems"][0]["kind"] == "flipped"


def test_a_flip_outside_of_samples_is_found(folder):
    """In the end marker, which no reader looks at."""
    tar = folder / "shard-000002.tar"
    flip(tar, tar.stat().st_size - 1)
    report = verify_shards(folder)
    assert found(report) == [("flipped", "shard-000002.tar")]
    assert "outside of samples" in report.problems[0].message


@pytest.mark.parametrize(("change", "kind"), [(-700, "truncated"), (512, "appended")])
def test_other_sizes_are_named(folder, change, kind):
    tar = folder / "shard-000002.tar"
    os.truncate(tar, tar.stat().st_size + change)
    report = verify_shards(folder)
    assert (kind, "shard-000002.tar") in found(report)
    assert {name for _, name in found(report)} == {"shard-000002.tar"}


def test_lost_samples_are_named(folder):
    tar = folder / "shard-000001.tar"
    os.truncate(tar, int(read_index(tar).sample_start[2]) + 100)
    report = verify_shards(folder)
    assert found(report) == [("truncated", "shard-000001.tar"), ("flipped", "shard-000001.tar")]
    assert report.problems[1].samples == ("000000007", "000000008", "000000009")


def test_swapped_shards_are_named_with_their_owner(folder):
    first, second = folder / "shard-000000.tar", folder / "shard-000001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    report = verify_shards(folder)
    assert found(report) == [("swapped", "shard-000000.tar"), ("swapped", "shard-000001.tar")]
    assert f"got that of {second}" in report.problems[0].message


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_an_index_of_another_shard_is_named_with_its_owner(folder, which):
    mine, theirs = folder / "shard-000002.tar", folder / "shard-000000.tar"
    for i in which:
        Path(index_paths(mine)[i]).write_bytes(Path(index_paths(theirs)[i]).read_bytes())
    report = verify_shards(folder)
    swapped = [p for p in report.problems if p.kind == "swapped"]
    assert [p.path for p in swapped] == [str(index_paths(mine)[1 if 1 in which else 0])]
    assert str(theirs) in swapped[0].message
    assert {name for _, name in found(report)} <= {
        f"{mine.name}{s}" for s in ("", ".idx", ".columns")
    }


def test_missing_and_extra_files_are_named(folder):
    (folder / "shard-000001.tar").unlink()
    (folder / "shard-000002.tar.columns").unlink()
    (folder / "shard-000003.tar.tmp").write_bytes(b"half")
    (folder / "README.md").write_text("mine")
    assert found(verify_shards(folder)) == [
        ("missing", "shard-000002.tar.columns"),
        ("missing", "shard-000001.tar"),
        ("extra", "shard-000001.tar.columns"),
        ("extra", "shard-000001.tar.idx"),
        ("extra", "shard-000003.tar.tmp"),
    ]


def test_a_shard_that_is_there_twice_is_named(folder):
    for suffix in ("", ".idx", ".columns"):
        data = (folder / f"shard-000001.tar{suffix}").read_bytes()
        (folder / f"shard-000003.tar{suffix}").write_bytes(data)
    report = verify_shards(folder)
    assert found(report) == [("duplicate", "shard-000003.tar")]


def test_files_are_checked_without_their_folder(folder):
    """Some shards of a set, chosen by name, lack nothing."""
    assert verify_shards([folder / "shard-000002.tar"]).ok


def test_what_cannot_be_read_is_a_problem(folder):
    (folder / "shard-000001.tar.columns").unlink()
    (folder / "shard-000001.tar.columns").mkdir()
    assert ("unreadable", "shard-000001.tar") in found(verify_shards(folder))


def test_remote_shards_are_verified(folder):
    with serving(folder) as server:
        urls = [server.url + "/shard-{000000..000002}.tar"]
        assert verify_shards(urls).ok
        flip(folder / "shard-000001.tar", 700)
        report = verify_shards(urls)
        assert report.problems[0].path == f"{server.url}/shard-000001.tar"
        assert report.num_damaged == 1
        (folder / "shard-000002.tar.idx").unlink()
        assert ("missing", "shard-000002.tar.idx") in found(verify_shards(urls))
