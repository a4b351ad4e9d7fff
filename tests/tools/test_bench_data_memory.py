import importlib.util
from pathlib import Path

from tests.data.packs import tiny_config, tiny_processor
from triptych_data.loader import PackLoader

TOOL = Path(__file__).parents[2] / "tools" / "bench_data_memory.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("bench_data_memory", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_memory_is_flat_over_many_batches(tmp_path):
    """3,000 samples in 230 batches; the tool itself takes 100,000."""
    tool = load_tool()
    tool.write_texts(tmp_path, 500)
    config = tiny_config([str(tmp_path / "shards")], seq_len=1024, num_workers=2)
    loader = PackLoader(config, tiny_processor(), rank=0, world_size=1)
    rows = list(tool.memory_over(loader, 3000))
    assert rows[-1]["samples"] >= 3000 and rows[-1]["batches"] > 180
    settled = rows[len(rows) // 2]
    for name in ("trainer", "server", "workers"):
        assert rows[-1][name] - settled[name] < 4, rows  # MiB


def test_the_first_batch_comes_within_a_second_at_any_depth(tmp_path):
    tool = load_tool()
    tool.write_texts(tmp_path, 500)
    config = tiny_config([str(tmp_path / "shards")], seq_len=1024)
    for depth in tool.DEPTHS:
        assert tool.first_batch(config, tiny_processor(), depth)[1] < 1
