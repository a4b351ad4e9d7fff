"""What shards hold, in numbers: sizes, texts, media."""

from itertools import pairwise
from typing import Any

import numpy as np

from triptych_data.sample import KINDS
from triptych_data.shards.reader import Shards

SIDES = (0, 128, 256, 512, 768, 1024, 2048, np.inf)
"""Bounds of the resolution histogram: the side in pixels of a square of the image's area."""
BAR = 32
"""Characters of a histogram's longest possible bar."""
MOST_ROWS = 12


def survey(shards: Shards) -> dict[str, Any]:
    """Counts and distributions of `shards`, from their indexes alone; ready for JSON."""
    kinds = shards.media.kind
    images = np.concatenate([[0], np.cumsum(kinds == KINDS.index("image"))])
    counts = np.diff(images[shards.media_start])
    videos = kinds == KINDS.index("video")
    audios = (kinds == KINDS.index("audio")) & (shards.media.seconds > 0)  # a video may be silent
    widths, heights = shards.media.size[kinds == KINDS.index("image")].T.astype(np.float64)
    side = np.sqrt(widths * heights)
    aspect = np.maximum(widths, heights) / np.minimum(widths, heights)
    return {
        "num_shards": len(shards.paths),
        "num_samples": shards.num_samples,
        "num_images": int(images[-1]),
        "num_videos": int(videos.sum()),
        "num_audios": int(audios.sum()),
        "tar_bytes": sum(index.tar_bytes for index in shards.indexes),
        "fingerprint": shards.fingerprint,
        "text_bytes": spread(shards.text_bytes),
        "images_per_sample": {
            str(n): int(count) for n, count in enumerate(np.bincount(counts)) if count
        },
        "image_side": {
            f"{low}-{high}" if high < np.inf else f"{low}+": int(
                ((low <= side) & (side < high)).sum()
            )
            for low, high in pairwise(SIDES)
        },
        "image_aspect_max": round(float(aspect.max()), 2) if len(aspect) else None,
        "video_seconds": spread(shards.media.seconds[videos]) if videos.any() else None,
        "video_frames": spread(shards.media.frames[videos]) if videos.any() else None,
        "audio_seconds": spread(shards.media.seconds[audios]) if audios.any() else None,
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Sum, mean and quantiles of per-sample values (N,)."""
    low, median, high, top = np.quantile(values, [0, 0.5, 0.99, 1]).tolist()
    return {
        "total": round(values.sum().item(), 1),
        "mean": round(float(values.mean()), 1),
        "min": low,
        "median": median,
        "p99": round(high, 1),
        "max": top,
    }


def media_counts(report: dict[str, Any]) -> str:
    """How many images and, if there are any, videos and audios."""
    names = ("images", "videos", "audios")
    return ", ".join(
        f"{report[f'num_{name}']:,} {name}"
        for name in names
        if report[f"num_{name}"] or name == "images"
    )


def in_units(size: int) -> str:
    """Bytes as a short decimal: 12.3 MB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    step = min((len(str(size)) - 1) // 3, len(units) - 1)
    return f"{size / 1000**step:.4g} {units[step]}"


def as_text(report: dict[str, Any]) -> str:
    """A survey, with a forecast or without, for people."""
    lines = [
        f"{report['num_samples']:,} samples, {media_counts(report)}: "
        f"{report['num_shards']:,} shards, {in_units(report['tar_bytes'])}",
        f"fingerprint {report['fingerprint'][:16]}",
        "",
        f"{'per sample':<12}" + "".join(f"{name:>13}" for name in report["text_bytes"]),
    ]
    names = {
        "text_bytes": "text bytes",
        "tokens": "tokens",
        "targets": "targets",
        "patches": "patches",
        "video_seconds": "video s",
        "video_frames": "video frames",
        "audio_seconds": "audio s",
    }
    for key, name in names.items():
        if report.get(key):
            lines.append(f"{name:<12}" + "".join(f"{v:>13,.6g}" for v in report[key].values()))
    lines += ["", "images per sample", *_bars(report["images_per_sample"])]
    if report["num_images"]:
        title = "image side, pixels (square root of the area); "
        lines += ["", f"{title}largest aspect ratio {report['image_aspect_max']}"]
        lines += _bars(report["image_side"])
    if packing := report.get("packing"):
        lines += [
            "",
            f"packs of {packing['seq_len']:,} tokens: {packing['num_packs']:,} an epoch, "
            f"{packing['samples_per_pack']:,} samples each, {packing['fill']:.2%} filled, "
            f"{packing['target_share']:.1%} of tokens are targets",
        ]
        if packing["documents_cut"]:
            lines.append(f"{packing['documents_cut']:,} documents are longer and cut into pieces")
        if packing["too_long"]:
            lines.append(f"{packing['too_long']:,} samples are longer than a pack and left out")
        if packing["refused"]:
            lines.append(f"{packing['refused']:,} samples are refused: {packing['refused_first']}")
    if (balance := report.get("balance")) and balance["imbalance"]:
        lines.append(
            f"the slowest of {balance['ranks']} ranks computes {balance['imbalance'] - 1:.1%} "
            f"longer than the mean (packs at random: {balance['imbalance_at_random'] - 1:.1%})"
        )
    return "\n".join(lines)


def _bars(histogram: dict[str, int]) -> list[str]:
    rows = [(name, count) for name, count in histogram.items() if count]
    if len(rows) > MOST_ROWS:  # a long tail of documents with many images
        tail = rows[MOST_ROWS - 1 :]
        rows = [*rows[: MOST_ROWS - 1], (f"{tail[0][0]}+", sum(count for _, count in tail))]
    total = sum(histogram.values())
    return [
        f"{name:>12} {count:>12,} {count / total:>7.1%} {'█' * round(BAR * count / total)}".rstrip()
        for name, count in rows
    ]
