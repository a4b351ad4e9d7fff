"""A Qwen3-VL-2B-shaped model folder without weights, for speed and memory measurements.

The architecture is Qwen3-VL-2B-Instruct's published config.json; the tokenizer is the tiny demo
one, whose ids all lie inside the real vocabulary, so that no download is needed.

    python tools/make_bench_model.py OUT_DIR
"""

import json
import shutil
from pathlib import Path

import click

TINY = Path(__file__).parent.parent / "stages/configs/qwen3_vl_tiny"
TEXT = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 5_000_000,
    "mrope_interleaved": True,
    "mrope_section": [24, 20, 20],
}
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}


@click.command()
@click.argument("out_dir", type=click.Path(path_type=Path))
def main(out_dir: Path) -> None:
    """Write the folder to OUT_DIR, which must not exist."""
    if out_dir.exists():
        raise click.ClickException(f"{out_dir}: must not exist; name another folder")
    shutil.copytree(TINY, out_dir)
    config = json.loads((out_dir / "config.json").read_text())
    config["text_config"] |= TEXT | {"rope_parameters": ROPE}
    config["vision_config"] |= VISION
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        processor = json.loads((out_dir / name).read_text())
        processor |= {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
        processor["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
        (out_dir / name).write_text(json.dumps(processor, indent=2) + "\n")


if __name__ == "__main__":
    main()
