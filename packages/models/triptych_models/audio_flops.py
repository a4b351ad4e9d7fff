"""FLOPs of Qwen's audio towers, counted as triptych_models.flops does the rest.

Frames that pad a chunk are not counted, nor is the dummy of a row without recordings.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from .audio_tower import cut, halve
from .flops import Work, with_backward
from .qwen3_audio_tower import window_tokens


def whisper_flops(
    audio: Any,
    batch: Mapping[str, Any],
    trainable: Collection[str],
    *,
    chunk: int,
    output_dim: int,
    adapted: bool,
) -> float:
    """Forward + backward FLOPs of a tower of Whisper's that attends within chunks of so many
    frames, and of the linear that projects its features.

    The batch's audio_lengths are on the host. As triptych_models.flops.qwen3_vl_flops.
    """
    lengths = batch.get("audio_lengths")
    if lengths is None:
        return 0.0
    hears, projects = "audio" in trainable, "projector" in trainable
    weights = set() if adapted else trainable
    hidden, pairs = audio.d_model, int(halve(cut(lengths, chunk)).square().sum())
    halved, tokens = whisper_rows(lengths, chunk)
    first = Work(2.0 * 3 * audio.num_mel_bins * hidden * int(lengths.sum()), 0.0)
    second = Work(2.0 * 3 * hidden * hidden * halved, 0.0)
    layers = tower_layers(audio, halved, pairs)
    projector = Work(2.0 * hidden * output_dim * tokens, 0.0)
    learns = "audio" in weights
    return (
        with_backward(first, weight=learns, inputs=False)  # frames need no gradient
        + with_backward(second, weight=learns, inputs=learns)  # no adapter before it
        + with_backward(layers, weight=learns, inputs=hears)
        + with_backward(projector, weight="projector" in weights, inputs=hears or projects)
    )


def whisper_rows(lengths: Tensor, chunk: int) -> tuple[int, int]:
    """Rows of a tower of Whisper's layers, and of what projects its features."""
    return int(halve(cut(lengths, chunk)).sum()), int((halve(lengths) // 2).sum())


def conv2d_audio_flops(
    audio: Any, batch: Mapping[str, Any], trainable: Collection[str], *, adapted: bool
) -> float:
    """The same of Qwen3-Omni's, whose convolutions halve mel bands, too."""
    lengths = batch.get("audio_lengths")
    if lengths is None:
        return 0.0
    hears, projects = "audio" in trainable, "projector" in trainable
    weights = set() if adapted else trainable
    learns = "audio" in weights
    hidden, channels = audio.d_model, audio.downsample_hidden_size
    times, bands, inputs = cut(lengths, 2 * audio.n_window), audio.num_mel_bins, 1
    work = 0.0
    for number in range(3):
        times, bands = halve(times), (bands + 1) // 2
        convolution = Work(2.0 * 9 * inputs * channels * bands * int(times.sum()), 0.0)
        # Frames need no gradient.
        work += with_backward(convolution, weight=learns, inputs=learns and number > 0)
        inputs = channels
    tokens = int(times.sum())
    each = cut(tokens_of(lengths, 2 * audio.n_window), window_tokens(audio))
    layers = tower_layers(audio, tokens, int(each.square().sum()))
    embedding = Work(2.0 * channels * bands * hidden * tokens, 0.0)
    projector = Work(2.0 * hidden * (hidden + audio.output_dim) * tokens, 0.0)
    return (
        work
        + with_backward(embedding, weight=learns, inputs=learns)
        + with_backward(layers, weight=learns, inputs=hears)
        + with_backward(projector, weight="projector" in weights, inputs=hears or projects)
    )


def tokens_of(lengths: Tensor, size: int) -> Tensor:
    """Tokens (num_audios,) of recordings cut every `size` frames and halved three times."""
    rest = lengths % size
    return lengths // size * -(-size // 8) + -(-rest // 8)


def tower_layers(audio: Any, rows: int, pairs: int) -> Work:
    """All layers of a tower over so many rows, and pairs of them that attention looks at."""
    hidden, inner, layers = audio.d_model, audio.encoder_ffn_dim, audio.encoder_layers
    weights = 4 * hidden * hidden + 2 * hidden * inner
    return Work(2.0 * layers * weights * rows, 4.0 * layers * hidden * pairs)
