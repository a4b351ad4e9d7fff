import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.chats import chat, encoded_image, make_shards, write_jsonl
from triptych_data.shards.index import index_paths
from triptych_data.shards.reader import Shards
from triptych_data.shards.reshard import reshard
from triptych_data.shards.scan import build_index, index_or_verify
from triptych_data.shards.write import write_shards


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples(folder: Path) -> list[tuple[object, ...]]:
    return [(s.key, s.json, s.media) for s in Shards.open([folder])]


def test_the_same_samples_in_larger_shards_are_those_of_one_run(tmp_path):
    make_shards(tmp_path, count=40, samples_per_shard=3)
    write_shards(tmp_path / "chats.jsonl", tmp_path / "whole", samples_per_shard=11)
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        report = reshard([tmp_path / "shards"], out, samples_per_shard=11, num_workers=workers)
        assert contents(out) == contents(tmp_path / "whole"), "byte for byte, indexes too"
        assert (report.num_samples, len(report.shards)) == (40, 4)


def test_a_shuffle_keeps_each_sample_once_and_follows_its_seed(tmp_path):
    make_shards(tmp_path, count=40, samples_per_shard=3)
    before = samples(tmp_path / "shards")
    orders = []
    for seed in (0, 1):
        reshard([tmp_path / "shards"], tmp_path / f"s{seed}", shuffle_seed=seed)
        after = samples(tmp_path / f"s{seed}")
        assert sorted(after, key=lambda sample: sample[0]) == before
        orders.append([sample[0] for sample in after])
    assert orders[0] != orders[1] != [sample[0] for sample in before]


def test_what_is_written_has_a_true_index_and_webdataset_reads_it(tmp_path):
    make_shards(tmp_path, count=20, samples_per_shard=3)
    report = reshard([tmp_path / "shards"], tmp_path / "out", shuffle_seed=0, rekey=True)
    for shard in report.shards:
        fingerprint = Shards.open([shard]).indexes[0].fingerprint
        assert build_index(shard).fingerprint == fingerprint
    theirs = webdataset.WebDataset([str(path) for path in report.shards], shardshuffle=False)
    assert [sample["__key__"] for sample in theirs] == [f"{i:09d}" for i in range(20)]


def test_rekeyed_runs_of_one_input_are_equal(tmp_path):
    make_shards(tmp_path, count=20, samples_per_shard=3)
    reshard([tmp_path / "shards"], tmp_path / "kept")
    reshard([tmp_path / "shards"], tmp_path / "new", rekey=True)
    assert contents(tmp_path / "kept") == contents(tmp_path / "new"), "they were numbered already"


def test_two_runs_join_only_with_new_keys(tmp_path):
    make_shards(tmp_path, count=12)
    source = write_jsonl(tmp_path / "b.jsonl", [chat(answer=f"B {i}") for i in range(5)])
    write_shards(source, tmp_path / "b")
    both = [tmp_path / "shards", tmp_path / "b"]
    with pytest.raises(ValueError, match=r"sample 00000000\d: a key must be unique, got that of"):
        reshard(both, tmp_path / "out")
    reshard(both, tmp_path / "out", rekey=True)
    joined = samples(tmp_path / "out")
    assert [sample[1] for sample in joined] == [s[1] for part in both for s in samples(part)]
    assert [sample[0] for sample in joined] == [f"{i:09d}" for i in range(17)]


def test_choosing_by_keys_and_number(tmp_path):
    make_shards(tmp_path, count=12)
    (tmp_path / "keys").write_text("000000007\n000000002\n\n")
    for name, options, expected in (
        ("only", {"keys": tmp_path / "keys"}, [2, 7]),
        ("without", {"without_keys": tmp_path / "keys"}, [i for i in range(12) if i not in (2, 7)]),
        ("first", {"num_samples": 4}, [0, 1, 2, 3]),
    ):
        reshard([tmp_path / "shards"], tmp_path / name, **options)
        assert [int(str(sample[0])) for sample in samples(tmp_path / name)] == expected
    (tmp_path / "keys").write_text("000000007\nnowhere\n")
    with pytest.raises(ValueError, match=r"keys: each key must be one .* got 'nowhere' that no"):
        reshard([tmp_path / "shards"], tmp_path / "out", keys=tmp_path / "keys")


def test_a_damaged_sample_is_named_and_nothing_appears(tmp_path):
    shards = make_shards(tmp_path, count=12).shards
    data = bytearray(shards[1].read_bytes())
    data[1500] ^= 1
    shards[1].write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000001.tar: sample \d+: .* another checksum"):
        reshard([tmp_path / "shards"], tmp_path / "out", samples_per_shard=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]


def test_a_stopped_run_goes_on(tmp_path):
    make_shards(tmp_path, count=40, samples_per_shard=3)
    options = {"samples_per_shard": 7, "shuffle_seed": 2}
    reshard([tmp_path / "shards"], tmp_path / "whole", **options)

    def stop(_title: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard([tmp_path / "shards"], tmp_path / "out", on_progress=stop, **options)
    with pytest.raises(ValueError, match="samples must be that of the unfinished run"):
        reshard([tmp_path / "shards"], tmp_path / "out", samples_per_shard=7)
    assert reshard([tmp_path / "shards"], tmp_path / "out", **options).kept_shards == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_foreign_tars_keep_their_headers_and_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(9):
            for name, data in ((f"dir/{i}.jpg", encoded_image(5 + i, 5)), (f"dir/{i}.txt", b"A.")):
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.uname = len(data), 1234.5, "someone"
                tar.addfile(info, io.BytesIO(data))
    index_or_verify(tmp_path / "x.tar", layout="members")
    report = reshard([tmp_path / "x.tar"], tmp_path / "out", samples_per_shard=4, shuffle_seed=1)
    seen = {}
    for shard in report.shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uname) == (1234.5, "someone")
                seen[member.name] = tar.extractfile(member).read()
    assert len(seen) == 18 and seen["dir/3.jpg"] == encoded_image(8, 5)
    opened = Shards.open(report.shards)
    assert {bytes(opened.read_members(i)[1]) for i in range(9)} == {b"A."}
    with pytest.raises(ValueError, match="must all hold chats or all other members"):
        reshard([tmp_path / "x.tar", make_shards(tmp_path).shards[0]], tmp_path / "both")


def test_the_output_is_another_folder(tmp_path):
    shards = make_shards(tmp_path).shards
    with pytest.raises(ValueError, match="must be another folder than the inputs'"):
        reshard([tmp_path / "shards"], tmp_path / "shards", overwrite=True)
    assert all(path.exists() for shard in shards for path in (shard, *index_paths(shard)))
    assert np.all([Shards.open([shard]).num_samples for shard in shards])
