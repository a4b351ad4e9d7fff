import os
import stat

import numpy as np
import pytest

from tests.data.chats import chat, encoded_image, write_jsonl
from tests.data.packs import MODEL, tiny_processor, write_mixture
from triptych_data.plan import lengths as module
from triptych_data.plan.lengths import Lengths, check_refused, fitting_samples, sample_lengths
from triptych_data.processor import Processor
from triptych_data.shards.reader import Shards
from triptych_data.shards.write import write_shards


@pytest.fixture
def shards(tmp_path):
    return Shards.open(write_mixture(tmp_path))


def measured(shards):
    rows = [tiny_processor().encode(shards.read(i)) for i in range(shards.num_samples)]
    patches = [0 if row.pixel_values is None else len(row.pixel_values) for row in rows]
    grids = [row.image_grid_thw.prod(dim=1) for row in rows]
    return Lengths(
        np.array([len(row.input_ids) for row in rows]),
        np.array([row.num_targets for row in rows]),
        np.array(patches),
        np.array([len(grid) for grid in grids]),
        np.array([int((grid**2).sum()) for grid in grids]),
        np.array([int(row.audio_lengths.sum()) for row in rows]),
    )


def assert_same(got, expected):
    assert [column.dtype for column in got] == [np.int32] * 4 + [np.int64, np.int32]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def caches(folder):
    return sorted(folder.glob("**/*.lengths-*.safetensors"))


def test_lengths_are_those_of_encoding_and_are_kept(shards, tmp_path):
    reports = []
    got = sample_lengths(shards, tiny_processor(), progress=lambda *count: reports.append(count))
    assert_same(got, measured(shards))
    assert reports == [(25, 60), (50, 60), (60, 60)]
    names = [path.name for path in caches(tmp_path)]
    short = tiny_processor().fingerprint[:12]
    assert names == [f"{path.name}.lengths-{short}.safetensors" for path in shards.paths]

    reports.clear()
    again = sample_lengths(shards, tiny_processor(), progress=lambda *count: reports.append(count))
    assert_same(again, got)
    assert not reports  # nothing was measured


def test_a_pool_measures_the_same(shards, tmp_path, monkeypatch):
    inline = sample_lengths(shards, tiny_processor())
    for path in caches(tmp_path):
        path.unlink()
    monkeypatch.setattr(module, "_INLINE_BYTES", 0)
    monkeypatch.setattr(module, "_CHUNK", 7)
    reports = []
    pooled = sample_lengths(
        shards, tiny_processor(), num_workers=2, progress=lambda *count: reports.append(count)
    )
    assert_same(pooled, inline)
    assert reports[-1] == (60, 60)


def test_another_processor_has_its_own_cache(shards, tmp_path):
    small = Processor.from_directory(MODEL, max_pixels=1024)
    one, other = sample_lengths(shards, tiny_processor()), sample_lengths(shards, small)
    assert one.num_patches.max() > 2 * 16 >= other.num_patches.max()
    assert len(caches(tmp_path)) == 2 * len(shards.paths)


def test_damaged_and_stale_caches_are_measured_again(shards, tmp_path):
    expected = sample_lengths(shards, tiny_processor())
    damaged, stale, _ = caches(tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:40])
    stale.write_bytes(caches(tmp_path)[2].read_bytes())  # of another shard
    reports = []
    again = sample_lengths(shards, tiny_processor(), progress=lambda *count: reports.append(count))
    assert_same(again, expected)
    assert reports[-1] == (50, 50)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_cached_elsewhere(shards, tmp_path, monkeypatch):
    folder = shards.paths[0].parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        check_cached_elsewhere(shards, tmp_path)
    finally:
        folder.chmod(stat.S_IRWXU)


def test_unwritable_place_is_cached_elsewhere(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    short = tiny_processor().fingerprint[:12]
    for path in shards.paths:  # a folder of that name stands in the way, for root too
        path.with_name(f"{path.name}.lengths-{short}.safetensors").mkdir()
        (path.with_name(f"{path.name}.lengths-{short}.safetensors") / "x").touch()
    check_cached_elsewhere(shards, tmp_path)


def check_cached_elsewhere(shards, tmp_path):
    got = sample_lengths(shards, tiny_processor())
    assert len(list((tmp_path / "cache" / "triptych").iterdir())) == len(shards.paths)
    reports = []
    again = sample_lengths(shards, tiny_processor(), progress=lambda *count: reports.append(count))
    assert_same(again, got)
    assert not reports


@pytest.mark.parametrize("num_workers", [1, 2])
def test_refused_samples_have_no_length_and_are_left_out(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(module, "_INLINE_BYTES", 0)
    shards = Shards.open(write_refused(tmp_path))
    lengths = sample_lengths(shards, tiny_processor(), num_workers=num_workers)
    assert (lengths.num_tokens > 0).tolist() == [True, False, True]
    assert_same(sample_lengths(shards, tiny_processor()), lengths)  # from the cache
    assert fitting_samples(shards, lengths, 512, None, skip_long=False).tolist() == [0, 2]


def test_too_many_refused_samples_are_an_error_that_names_the_first(tmp_path):
    shards = Shards.open(write_refused(tmp_path))
    lengths = sample_lengths(shards, tiny_processor())
    assert check_refused(shards, lengths, tiny_processor(), 0.34) == 1
    message = r"shard-000000\.tar: sample 000000001: .*200 times.*\(1 of 3 samples"
    for rate in (0.33, 0.0):
        with pytest.raises(ValueError, match=message):
            check_refused(shards, lengths, tiny_processor(), rate)


def write_refused(folder):
    (folder / "slim.png").write_bytes(encoded_image(2, 401, "PNG"))
    records = [chat(), chat(image="slim.png"), chat()]
    write_shards(write_jsonl(folder / "chats.jsonl", records), folder / "shards")
    return [folder / "shards"]


def test_long_sample_is_named_or_skipped(shards):
    lengths = sample_lengths(shards, tiny_processor())
    longest = int(np.argmax(lengths.num_tokens))
    bound = int(lengths.num_tokens[longest]) - 1
    first = int(np.argmax(lengths.num_tokens > bound))
    message = f"sample {shards.keys(first)}: .*seq_len={bound}, .* got {bound + 1} tokens"
    with pytest.raises(ValueError, match=message):
        fitting_samples(shards, lengths, bound, None, skip_long=False)
    kept = fitting_samples(shards, lengths, bound, None, skip_long=True)
    assert kept.tolist() == np.flatnonzero(lengths.num_tokens <= bound).tolist()
    assert len(fitting_samples(shards, lengths, bound + 1, None, skip_long=False)) == 60


def test_patch_bound_counts_too(shards):
    lengths = sample_lengths(shards, tiny_processor())
    with pytest.raises(ValueError, match="max_patches=4"):
        fitting_samples(shards, lengths, 4096, 4, skip_long=False)
    few = fitting_samples(shards, lengths, 4096, None, 1, skip_long=True)
    assert few.tolist() == np.flatnonzero(lengths.num_images <= 1).tolist() != list(range(60))
    kept = fitting_samples(shards, lengths, 4096, 4, skip_long=True)
    assert (lengths.num_patches[kept] == 0).all() and len(kept)


def test_nothing_that_fits_is_an_error(shards):
    lengths = sample_lengths(shards, tiny_processor())
    with pytest.raises(ValueError, match="none that fits"):
        fitting_samples(shards, lengths, 2, None, skip_long=True)
