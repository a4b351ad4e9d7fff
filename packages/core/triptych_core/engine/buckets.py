"""How parameters are put together into buckets, known from their sizes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# Elements of a bucket: 100 MB in fp32, some milliseconds of a network, so that the last one's
# reduction ends soon after the backward pass.
BUCKET = 25_000_000

# A weight begins at a multiple of so many elements: 256 bytes in bf16, as an allocation of its own
# would. Matrix products are slower, or refused, on addresses of less than 16.
ALIGN = 128

# Buckets whose sums are on their way while the next one fills.
IN_FLIGHT = 2


def split_sizes(sizes: Sequence[int], size: int) -> Iterator[slice]:
    """Neighbours, up to the first that makes `size` elements together."""
    begin = total = 0
    for index, numel in enumerate(sizes):
        total += numel
        if total >= size:
            yield slice(begin, index + 1)
            begin, total = index + 1, 0
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def lay_out(sizes: Sequence[int], num_ranks: int) -> tuple[list[int], int]:
    """Where each of a bucket's parameters begins, and the elements of all, which ranks cut evenly.

    >>> lay_out([128, 3, 5], 2)
    ([0, 128, 256], 512)
    """
    begins, end = [], 0
    for numel in sizes:
        begins.append(end)
        end += _round_up(numel, ALIGN)
    return begins, _round_up(end, ALIGN * num_ranks)


def first_kept(outside: int, layers: Sequence[int], max_live: int) -> int:
    """The first of the last layers that ZeRO-3 keeps whole between forward and backward.

    They are as many as may be with what is outside of layers, and at least one: the last layer's
    backward comes next. All in elements.

    >>> first_kept(100, [50, 50, 50], 200)
    1
    """
    first, live = len(layers), outside
    while first > 0 and (first == len(layers) or live + layers[first - 1] <= max_live):
        first -= 1
        live += layers[first]
    return first


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
