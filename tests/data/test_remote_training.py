import itertools
from pathlib import Path

import torch

from tests.data.packs import tiny_config, tiny_processor, write_mixture
from tests.data.webserver import serving
from triptych_data.loader import PackLoader


def test_batches_from_a_server_are_those_from_disk(tmp_path, monkeypatch):
    """Workers read through one small cache, from a server that fails now and then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lengths"))
    (folder,) = write_mixture(tmp_path)
    remote = {"cache_dir": str(tmp_path / "blocks"), "cache_bytes": 60_000, "block_bytes": 4096}
    with serving(Path(folder)) as server:
        server.fault, server.faults = "unavailable", 5
        batches = []
        for shards, workers in ([folder], 0), ([server.url + "/shard-{000000..000002}.tar"], 2):
            config = tiny_config(shards, num_workers=workers, remote=remote)
            loader = PackLoader(config, tiny_processor(), rank=0, world_size=1)
            batches.append(list(itertools.islice(loader, 12)))
        assert server.faults == 0 and server.gets(".tar") > 3
    for local_batch, remote_batch in zip(*batches, strict=True):
        assert local_batch["sample_keys"] == remote_batch["sample_keys"]
        assert torch.equal(local_batch["input_ids"], remote_batch["input_ids"])
        assert torch.equal(local_batch["pixel_values"], remote_batch["pixel_values"])
        assert not remote_batch["holes"]
    used = sum(path.stat().st_size for path in (tmp_path / "blocks").glob("??/*"))
    assert 0 < used <= 60_000
