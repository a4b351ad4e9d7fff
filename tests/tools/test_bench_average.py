"""The averager's benchmark measures what it says, on models of a few hundred kilobytes."""

from __future__ import annotations

import os
import sys

import torch

from tests.tiny import ROOT
from tests.tools.average_folders import read_weights, weights, write_folder

sys.path.insert(0, str(ROOT / "tools"))
import bench_average


def test_both_sides_do_the_whole_work(tmp_path, capsys):
    models = [write_folder(tmp_path / f"{n}", weights(n, torch.bfloat16)) for n in range(2)]
    output = tmp_path / "average"
    size = (models[0] / "model.safetensors").stat().st_size
    bench_average.prepare(models, output, warm=False)
    plain = bench_average.copy_plainly(models, output, 0)
    assert plain["seconds"] == plain["read"] + plain["write"] > 0
    assert size <= (output / "plain").stat().st_size < size + bench_average.CHUNK + 1
    bench_average.prepare(models, output, warm=True)
    assert not output.exists()
    words = [sys.executable, bench_average.TOOL, *models, "--output", output]
    ours = bench_average.run(words, output)
    assert ours["cpu"] > 0 and ours["memory"] > 50
    assert read_weights(output).keys() == read_weights(models[0]).keys()
    bench_average.show({"direct": [plain], "cached": [plain], "ours": [ours]}, models, warm=True)
    said = capsys.readouterr().out
    assert f"2 models of 0.00 GiB, inputs in the page cache, {os.cpu_count()} cores" in said
    assert "x the disk's own time" in said
