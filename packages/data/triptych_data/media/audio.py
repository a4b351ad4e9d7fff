"""Audio files to log-mel features as Whisper takes them, and how many tokens they become."""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from triptych_data.media import clips

# A Kaiser-windowed sinc: flat to 0.9 of the lower Nyquist frequency, 100 dB down from it on. Such a
# window needs 64 zero crossings a side for a transition this narrow (Kaiser's formula).
_ZEROS, _BETA, _CUTOFF = 64, 10.0, 0.95
_MOST_PHASES = 2000  # odd ratios of rates are rounded to this: less than 1 µs in a second
_FEWEST_PHASES = 64  # as one row of a matrix product each: 8 ms for 30 s of 48 kHz instead of 44
_LONGER = 0.1  # seconds that a recording may have beyond the bound: codecs pad
_EXACT = 1e-4  # samples; what floating point may have added to a whole number of them


class AudioRules(NamedTuple):
    """How a model hears: Hz, samples per window and from one to the next, mel bands, the seconds
    that a recording may have, and the frames of the chunks that become tokens by
    themselves, if there are such: then no silence follows a recording; or how many frames of it
    come with a recording. The defaults are Whisper's."""

    rate: int = 16_000
    window: int = 400
    hop: int = 160
    num_mels: int = 80
    max_seconds: float = 30.0
    chunk: int | None = None
    behind: int = 0


WHISPER = AudioRules()


def hear(data: bytes, rules: AudioRules) -> Tensor:
    """Decode an audio file to the frames that `heard` makes of it.

    Raises ValueError for a file that cannot be decoded, is too short for a token, or longer than
    the model hears.
    """
    wave = load_wave(data, rules.rate, rules.max_seconds + 2 * _LONGER)
    _check_length(len(wave) / rules.rate, rules)
    return heard(wave, rules)


def hear_video(data: bytes, rules: AudioRules) -> Tensor | None:
    """The same of the sound of a video file; None of one that has none.

    Raises ValueError as `hear`.
    """
    wave = load_wave(data, rules.rate, rules.max_seconds + 2 * _LONGER, kind="video")
    if not len(wave):
        return None
    _check_length(len(wave) / rules.rate, rules)
    return heard(wave, rules)


def heard(wave: Tensor, rules: AudioRules) -> Tensor:
    """Log-mel frames (N, num_mels) float32 of a wave (n,), as the processors of Qwen's models make
    them: those that begin in it, while silence follows up to `max_seconds`, and `behind` of that
    (zeros beyond its end); or, of chunks, as many as fit into it."""
    wave = wave[: _most_samples(rules)]
    if rules.chunk is not None:
        return log_mel(wave, rules).T.contiguous()
    frames = _heard(len(wave), rules)
    # Of the silence, as much as windows that reach into the sound look at: the rest is the floor.
    needed = 2 * rules.window + (1 + rules.behind) * rules.hop
    silence = min(needed, _most_samples(rules) - len(wave))
    found = log_mel(functional.pad(wave, (0, silence)), rules)[:, : frames + rules.behind].T
    return functional.pad(found, (0, 0, 0, frames + rules.behind - len(found)))


def heard_frames(seconds: float, rules: AudioRules) -> int:
    """Frames that `hear` makes of what has `seconds` in the index. Raises ValueError as it does."""
    _check_length(seconds, rules)
    samples = math.ceil(seconds * rules.rate - _EXACT)
    return _heard(min(samples, _most_samples(rules)), rules)


def most_frames(rules: AudioRules) -> int:
    """Frames of the longest recording."""
    return -(-_most_samples(rules) // rules.hop)


def _check_length(seconds: float, rules: AudioRules) -> None:
    """Cut off, it would be trained on beside words of what was left out."""
    if seconds > rules.max_seconds + _LONGER:
        raise ValueError(
            f"audio must be at most {rules.max_seconds:g} s long (chunk_length of the model), got "
            f"more; split it and its text"
        )


def _heard(samples: int, rules: AudioRules) -> int:
    frames = -(-samples // rules.hop)
    if rules.chunk is not None:  # the transform mirrors half a window at each end
        frames = max(samples, rules.window // 2 + 1) // rules.hop
    if audio_tokens(frames, rules.chunk) < 1:
        raise ValueError(
            f"audio must be long enough for a token, got {samples} samples at {rules.rate} Hz; "
            "leave it out"
        )
    return frames


def load_wave(
    data: bytes, rate: int, max_seconds: float | None = None, kind: str = "audio"
) -> Tensor:
    """The sound of a file of this kind at `rate` Hz: (n,) float32, the mean of its channels.

    What comes after `max_seconds` may be left out. Raises ValueError as `clips.read_audio`.
    """
    own_rate, channels = clips.read_audio(data, max_seconds, kind)
    return resample(torch.from_numpy(channels).mean(dim=0), own_rate, rate)


def resample(wave: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """(n,) float32 at another rate in Hz: (ceil(n * to_rate / from_rate),), band-limited.

    A polyphase filter: each of the `up` positions between input samples has its own kernel.
    """
    if from_rate == to_rate or not len(wave):
        return wave
    length = -(-len(wave) * to_rate // from_rate)
    ratio = Fraction(to_rate, from_rate).limit_denominator(_MOST_PHASES)
    fold = -(-_FEWEST_PHASES // ratio.numerator)
    up, down = fold * ratio.numerator, fold * ratio.denominator
    kernels, reach = _kernels(up, down)  # (up, 1, taps)
    padded = functional.pad(wave, (reach, reach + 2 * down))
    out = functional.conv1d(padded[None, None], kernels, stride=down)  # (1, up, m)
    return out[0].T.reshape(-1)[:length]


def log_mel(wave: Tensor, rules: AudioRules = WHISPER) -> Tensor:
    """Log-mel features (num_mels, n // hop) float32 of a wave (n,): Whisper's (arXiv 2212.04356).

    Power in mel bands as log10, cut off 8 below the largest of all, then (x + 4) / 4.
    """
    window = torch.hann_window(rules.window)
    if len(wave) <= rules.window // 2:  # the transform mirrors half a window at each end
        wave = functional.pad(wave, (0, rules.window // 2 + 1 - len(wave)))
    spectrum = torch.stft(wave, rules.window, rules.hop, window=window, return_complex=True)
    power = spectrum[:, :-1].abs() ** 2  # (window // 2 + 1, frames)
    bands = mel_filters(rules.rate, rules.window, rules.num_mels).T @ power
    log = bands.clamp(min=1e-10).log10()
    if log.numel():
        log = torch.maximum(log, log.max() - 8.0)
    return (log + 4.0) / 4.0


@lru_cache(maxsize=8)
def mel_filters(rate: int, window: int, num_mels: int) -> Tensor:
    """Triangles of equal area over frequencies (window // 2 + 1, num_mels): Slaney's mel scale.

    It is linear to 1 kHz, 15 mels, and logarithmic above: 27 mels for a factor of 6.4.
    """
    top = 15.0 + 27.0 * math.log(rate / 2 / 1000.0) / math.log(6.4)
    mels = np.linspace(0.0, top, num_mels + 2)
    hertz = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * 6.4 ** ((mels - 15.0) / 27.0))
    bins = np.linspace(0, rate / 2, window // 2 + 1)[:, None]
    rising = (bins - hertz[:-2]) / np.diff(hertz)[:-1]
    falling = (hertz[2:] - bins) / np.diff(hertz)[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return torch.from_numpy(triangles * 2.0 / (hertz[2:] - hertz[:-2])).float()


def audio_tokens(num_frames: int, chunk: int | None = None) -> int:
    """Tokens of `num_frames` after Whisper's convolution of stride 2 and pooling by 2.

    That is 25 a second: the rule of Qwen2-Audio and of Qwen2.5-Omni's audio tower. With chunks each
    is halved three times, and rounded up: Qwen3-Omni's, 13 a second.
    """
    if chunk is not None:
        whole, rest = divmod(num_frames, chunk)
        return whole * -(-chunk // 8) + -(-rest // 8)
    convolved = (num_frames - 1) // 2 + 1
    return (convolved - 2) // 2 + 1


def _most_samples(rules: AudioRules) -> int:
    return round(rules.max_seconds * rules.rate)


@lru_cache(maxsize=8)
def _kernels(up: int, down: int) -> tuple[Tensor, int]:
    """The filter of each output phase, (up, 1, taps) float32, and how far back it reaches."""
    cutoff = _CUTOFF * min(1.0, up / down)  # of the input's Nyquist frequency
    reach = math.ceil(_ZEROS / cutoff)
    taps = np.arange(-reach, reach + down + 1)
    distance = taps - np.arange(up)[:, None] * down / up  # (up, taps), in input samples
    inside = np.clip(1 - (distance * cutoff / _ZEROS) ** 2, 0, None)
    window = np.where(inside > 0, np.i0(_BETA * np.sqrt(inside)) / np.i0(_BETA), 0)
    return torch.from_numpy(cutoff * np.sinc(cutoff * distance) * window).float()[:, None], reach
