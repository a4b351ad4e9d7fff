"""FLOPs of Qwen2.5-Omni's audio tower, counted as triptych_models.flops does the rest.

Frames that pad a chunk are not counted, nor is the dummy of a row without recordings.
"""

from collections.abc import Collection, Mapping
from typing import Any

from .audio_tower import cut, halve
from .flops import Work, with_backward


def audio_flops(
    audio: Any, batch: Mapping[str, Any], trainable: Collection[str], *, adapted: bool
) -> float:
    """Forward + backward FLOPs of the tower and of what projects its features.

    The batch's audio_lengths are on the host. As triptych_models.flops.qwen3_vl_flops.
    """
    lengths = batch.get("audio_lengths")
    if lengths is None:
        return 0.0
    hears, projects = "audio" in trainable, "projector" in trainable
    weights = set() if adapted else trainable
    hidden, inner = audio.d_model, audio.encoder_ffn_dim
    chunks = cut(lengths, 2 * audio.n_window)
    frames, halved, tokens = (int(x.sum()) for x in (lengths, halve(chunks), halve(lengths) // 2))
    pairs = int(halve(chunks).square().sum())
    first = Work(2.0 * 3 * audio.num_mel_bins * hidden * frames, 0.0)
    second = Work(2.0 * 3 * hidden * hidden * halved, 0.0)
    layer = Work(2.0 * (4 * hidden + 2 * inner) * hidden * halved, 4.0 * hidden * pairs)
    layers = Work(*(audio.encoder_layers * each for each in layer))
    projector = Work(2.0 * hidden * audio.output_dim * tokens, 0.0)
    weight = "audio" in weights
    return (
        with_backward(first, weight=weight, inputs=False)  # frames need no gradient
        + with_backward(second, weight=weight, inputs=hears)
        + with_backward(layers, weight=weight, inputs=hears)
        + with_backward(projector, weight="projector" in weights, inputs=hears or projects)
    )
