"""Where the tokens of a video's sound stand among those of its pictures, as Qwen-Omni has them."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

import numpy as np


class SoundOrder(NamedTuple):
    """The tokens of a video with its sound, as they follow each other, and whether the two tokens
    before them have one position, and the two after them (Qwen2.5-Omni)."""

    pieces: tuple[tuple[str, int], ...]
    """kinds, and how many tokens"""
    shares_borders: bool


def sound_order(times: Sequence[float], tokens: int, heard: int, chunk: int) -> SoundOrder:
    """The order of `tokens` tokens at each of `times`, of M-RoPE, and of `heard` of sound, one a
    position.

    As transformers' processors of Qwen2.5-Omni, which cuts both every `chunk` positions and gives
    in turns a chunk of either, and with a chunk of 0 of Qwen3-Omni: by time, pictures first.
    """
    if chunk:
        pieces = tuple(_in_chunks(times, tokens, heard, chunk))
        return SoundOrder(pieces, shares_borders=True)
    return SoundOrder(tuple(_by_time(times, tokens, heard)), shares_borders=False)


def place_sound(order: SoundOrder, seen: np.ndarray) -> tuple[np.ndarray, float]:
    """Positions (3, N) of all tokens from those (3, n) of the video's, both from 0 on, and at which
    the next token is: after what comes last, as in stock's `get_rope_index`."""
    blocks, at = [], {"video": 0, "audio": 0}
    for kind, count in order.pieces:
        numbers = np.arange(at[kind], at[kind] + count)
        blocks.append(seen[:, numbers] if kind == "video" else np.tile(numbers, (3, 1)))
        at[kind] += count
    return np.concatenate(blocks, axis=1), blocks[-1].max() + 1


def _in_chunks(
    times: Sequence[float], tokens: int, heard: int, chunk: int
) -> Iterator[tuple[str, int]]:
    both = _chunks(times, tokens, chunk), _chunks(range(heard), 1, chunk)
    for seen, of_sound in zip_longest(*both, fillvalue=0):
        yield from ((kind, n) for kind, n in (("video", seen), ("audio", of_sound)) if n)


def _chunks(times: Sequence[float], tokens: int, chunk: int) -> list[int]:
    """How many tokens each chunk has; a token begins no more than one, as in stock, so that where
    pictures are further apart than a chunk the next ones are of one token."""
    ends = [0]
    for number, time in enumerate(times):
        begun = min(max(0, int(time // chunk) + 1 - len(ends)), tokens)
        ends += [number * tokens + each for each in range(begun)]
    ends.append(len(times) * tokens)
    return [end - start for start, end in pairwise(ends)]


def _by_time(times: Sequence[float], tokens: int, heard: int) -> Iterator[tuple[str, int]]:
    placed = 0
    for time in times:
        before = min(math.ceil(time), heard)
        if before > placed:
            yield "audio", before - placed
        placed = max(placed, before)
        yield "video", tokens
    if placed < heard:
        yield "audio", heard - placed
