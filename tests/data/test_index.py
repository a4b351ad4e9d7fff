import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.chats import chat, encoded_image, make_shards
from triptych_data.sample import dump_json
from triptych_data.shards.index import DTYPES, IndexDamage, index_paths, read_index, write_index
from triptych_data.shards.reader import Shards
from triptych_data.shards.scan import build_index
from triptych_data.shards.tar import BLOCK, END, header, padded, walk


def stored_chat(num_images: int = 0) -> bytes:
    """A chat in shard form."""
    record = chat()
    images = [{"type": "image", "index": i} for i in range(num_images)]
    record["messages"][0]["content"] = [*images, {"type": "text", "text": "What?"}]
    return dump_json(record)


def write_tar(
    path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return make_shards(tmp_path, count=6, samples_per_shard=6).shards[0]


def test_idx_is_energons_layout(shard):
    """u64 little-endian: `tarfile`'s offset of each sample's first header, then of the end."""
    with tarfile.open(shard) as tar:
        members = list(tar)
        starts = [m.offset for m in members if m.name.endswith(".json")]
        expected = np.array([*starts, tar.offset], dtype="<u8").tobytes()
    assert index_paths(shard)[0].read_bytes() == expected
    assert len(expected) == 7 * 8


def test_writer_and_scan_agree_to_the_byte(shard):
    written = [path.read_bytes() for path in index_paths(shard)]
    write_index(shard, build_index(shard))
    assert [path.read_bytes() for path in index_paths(shard)] == written


def test_columns_point_at_the_members(shard):
    index, data = read_index(shard), shard.read_bytes()
    assert index.tar_bytes == len(data)
    with tarfile.open(shard) as tar:
        for row, member in enumerate(tar):
            begin, size = int(index.member_offset[row]), int(index.member_size[row])
            assert data[begin : begin + size] == tar.extractfile(member).read()
            assert member.name.endswith("." + index.suffixes[index.member_suffix[row]])
    assert [index.key(i) for i in range(6)] == [f"{i:09d}" for i in range(6)]
    assert index.media_start.tolist() == [0, 0, 1, 3, 5, 5, 6]
    assert index.media_size.tolist() == [[w, w - 8] for w in (17, 18, 18, 19, 19, 21)]
    assert {name: getattr(index, name).dtype for name in DTYPES} == DTYPES


def test_fingerprint_follows_the_content(tmp_path):
    first = make_shards(tmp_path / "a", count=3).shards[0]
    again = make_shards(tmp_path / "b", count=3).shards[0]
    other = make_shards(tmp_path / "c", count=4).shards[0]
    prints = [read_index(shard).fingerprint for shard in (first, again, other)]
    assert prints[0] == prints[1] != prints[2]
    assert len(prints[0]) == 64


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_tars_of_tarfile_are_read(tmp_path, tar_format):
    """Long names take an extended header in GNU and pax tars; order in the tar does not matter."""
    image, folder = encoded_image(9, 6), "./größe/" + "x" * 40
    names = ["a", "b" * (30 if tar_format == tarfile.USTAR_FORMAT else 200)]
    members = [
        member
        for name in names
        for member in [
            (f"{folder}/{name}.10.jpg", image),
            *((f"{folder}/{name}.{i}.jpeg", image) for i in range(10)),
            (f"{folder}/{name}.json", stored_chat(11)),
            (f"{folder}/{name}.txt", b"not ours"),
        ]
    ]
    tar = write_tar(tmp_path / "x.tar", members, tar_format)
    write_index(tar, build_index(tar))
    first, second = Shards.open([tar])
    assert [first.key, second.key] == [f"{folder}/{name}" for name in names]
    assert second.media == [image] * 11 and second.json == json.loads(stored_chat(11))
    with tarfile.open(tar) as theirs:
        starts = [theirs.getmembers()[i].offset for i in (0, 13)]
    assert read_index(tar).sample_start[:-1].tolist() == starts


def test_tars_of_webdataset_are_read(tmp_path):
    image, tar = encoded_image(9, 6), tmp_path / "x.tar"
    with webdataset.TarWriter(str(tar)) as sink:
        for i in range(3):
            sink.write({"__key__": f"sample{i}", "json": stored_chat(1), "0.jpg": image})
    write_index(tar, build_index(tar))
    samples = list(Shards.open([tar]))
    assert [sample.key for sample in samples] == ["sample0", "sample1", "sample2"]
    assert all(sample.media == [image] for sample in samples)


def test_folders_and_hidden_files_are_no_samples(tmp_path):
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as sink:
        for name, data in [("d", None), ("d/._a.json", b"mac"), ("d/a.json", stored_chat())]:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (b"0", len(data))
            sink.addfile(info, io.BytesIO(data or b""))
    index = build_index(tar)
    assert index.num_samples == 1 and index.key(0) == "d/a"


def test_each_part_counts_its_image_in_the_order_of_the_text(tmp_path):
    record = json.loads(stored_chat(2))
    record["messages"][0]["content"] = [{"type": "image", "index": i} for i in (1, 0, 1)]
    images = [encoded_image(9, 6), encoded_image(20, 10)]
    members = [("a.json", dump_json(record)), ("a.0.jpg", images[0]), ("a.1.jpg", images[1])]
    index = build_index(write_tar(tmp_path / "x.tar", members))
    assert index.media_size.tolist() == [[20, 10], [9, 6], [20, 10]]


FOREIGN = {
    "members of one sample must lie side by side, got 'a'": [
        ("a.json", stored_chat()),
        ("b.json", stored_chat()),
        ("a.0.jpg", b""),
    ],
    "sample v1: media must be named": [  # webdataset would make one sample "v1" of the two
        ("v1.0_img.jpg", encoded_image()),
        ("v1.0_img.json", stored_chat(1)),
        ("v1.1_img.jpg", encoded_image()),
        ("v1.1_img.json", stored_chat(1)),
    ],
    "got v2.5_chat.json; keep dots out of keys": [("v2.5_chat.json", stored_chat())],
    "sample b: a sample must have a member b.json": [("a.json", stored_chat()), ("b.0.jpg", b"")],
    "a member must be there once": [("a.json", stored_chat()), ("a.json", stored_chat())],
    "media must be named <key>.<i>.<ext> with i from 0, got a.jpg": [
        ("a.json", stored_chat(1)),
        ("a.jpg", encoded_image()),
    ],
    "numbered from 0 without gaps": [("a.json", stored_chat(1)), ("a.1.jpg", encoded_image())],
    "index must number one of the sample's 0 media": [("a.json", stored_chat(1))],
    "every medium must be used": [("a.json", stored_chat()), ("a.0.jpg", encoded_image())],
    "member a.0.jpg: an image must be a whole": [("a.json", stored_chat(1)), ("a.0.jpg", b"jpg")],
    "sample a: must be valid JSON": [("a.json", b"{")],
    "must hold a sample, got none": [],
}


@pytest.mark.parametrize("message", FOREIGN)
def test_tars_that_readers_would_misread_are_refused(tmp_path, message):
    tar = write_tar(tmp_path / "x.tar", FOREIGN[message])
    with pytest.raises(ValueError) as error:
        build_index(tar)
    assert str(error.value).startswith(str(tar)) and message in str(error.value)


def test_links_are_refused(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("a.json", stored_chat())])
    with tarfile.open(tar, "a") as sink:
        link = tarfile.TarInfo("b.json")
        link.type, link.linkname = tarfile.LNKTYPE, "a.json"
        sink.addfile(link)
    with pytest.raises(ValueError, match=r"byte \d+: member 'b.json' must be a regular file"):
        build_index(tar)


def damaged(shard: Path, data: bytes) -> str:
    shard.write_bytes(data)
    with pytest.raises(ValueError) as error:
        build_index(shard)
    text = str(error.value)
    assert text.startswith(f"{shard}: ")
    return text


def test_damaged_structure_is_found_by_the_scan(shard):
    data, members = shard.read_bytes(), list(walk(shard))
    middle = members[5]
    flipped = bytearray(data)
    flipped[middle.start + 3] ^= 1
    assert f"byte {middle.start}: the header's checksum must be" in damaged(shard, bytes(flipped))
    wiped = data[: middle.start] + bytes(BLOCK) + data[middle.start + BLOCK :]
    assert f"byte {middle.start}: only zeros may follow" in damaged(shard, wiped)
    assert "must end by byte" in damaged(shard, data[: middle.data + 10])
    assert "a tar must end in two zero blocks" in damaged(shard, data[: -len(END)])
    assert "a tar must end in two zero blocks, got one" in damaged(shard, data[:-BLOCK])
    assert "a tar must end in two zero blocks" in damaged(shard, data[: middle.start])
    assert "only zeros may follow the end marker" in damaged(shard, data + data)
    assert "a tar must end in two zero blocks" in damaged(shard, b"")
    assert "the header's checksum" in damaged(shard, b"noise" * 1000)


def test_any_flip_or_cut_is_found_when_shards_are_opened_or_read(shard):
    """400 seeded damages of the tar and its index files: none may pass in silence."""
    chance = random.Random(0)
    files = [shard, *index_paths(shard)]
    sound = {path: path.read_bytes() for path in files}
    end = int(read_index(shard).sample_start[-1])
    for trial in range(400):
        path = files[trial % 3]
        data = bytearray(sound[path])
        at = chance.randrange(end if path == shard else len(data))
        if trial % 4 == 0:
            del data[at:]
        else:
            data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"shard-000000\.tar"):
            list(Shards.open([shard]))
        path.write_bytes(sound[path])
    assert len(list(Shards.open([shard]))) == 6


def test_an_index_of_another_shard_is_refused(tmp_path):
    first, second = make_shards(tmp_path, count=10).shards
    for mine, theirs in zip(index_paths(first), index_paths(second), strict=True):
        mine.write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match=r"must have the \d+ bytes of its index"):
        read_index(first)


def test_damage_crosses_processes_with_its_kind(shard):
    index_paths(shard)[1].unlink()
    with pytest.raises(IndexDamage) as error:
        read_index(shard)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.kind) == (str(error.value), "missing")


def test_a_missing_index_says_how_to_make_it(shard):
    for path in index_paths(shard):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=r"run: triptych-data index .*shard-000000\.tar"):
            read_index(shard)
        path.write_bytes(content)


def test_an_index_of_a_later_version_is_refused(shard):
    columns = index_paths(shard)[1]
    columns.write_bytes(columns.read_bytes().replace(rb"\"format\": 2", rb"\"format\": 3"))
    with pytest.raises(ValueError, match="must be of format 2, got 3"):
        read_index(shard)


def test_a_header_is_the_one_tarfile_writes():
    info = tarfile.TarInfo("000000001.0.jpg")
    info.size = 12_345
    theirs = tarfile.TarInfo.frombuf(header(info.name, info.size), "utf-8", "strict")
    assert (theirs.name, theirs.size, theirs.type) == (info.name, info.size, tarfile.REGTYPE)
    assert header(info.name, info.size) == info.tobuf(tarfile.USTAR_FORMAT)
    assert [padded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
