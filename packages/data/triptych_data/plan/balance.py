"""What a pack costs to compute, and an order in which neighbouring packs cost alike."""

from typing import NamedTuple

import numpy as np

from triptych_data.plan.permutation import hashes


class Cost(NamedTuple):
    """Compute per pack: sum of l·(l + linear) over documents of l tokens, plus `vision` times the
    sum of p·(p + vision_linear) over images and video frames of p patches, plus `target` for each
    token that is learnt and `audio` for each frame of a recording, of which a tower looks at few
    at a time.

    A decoder layer of width d spends 24·d²·l on its matrices and 2·d·l² on causal attention:
    l·(l + 12·d) in units of 2·d. A layer of a vision tower of width e: p·(p + 6·e) in units of
    4·e, attention being over all pairs there. So for d, e and numbers of layers D, E:
    linear = 12·d, vision_linear = 6·e, vision = 2·e·E / (d·D). The output layer over V tokens:
    target = V / D.
    """

    linear: int
    vision: float
    vision_linear: int
    target: int = 0
    audio: int = 0

    def of_samples(
        self,
        num_tokens: np.ndarray,
        num_patches: np.ndarray,
        patch_pairs: np.ndarray,
        num_targets: np.ndarray,
        audio_frames: np.ndarray,
    ) -> np.ndarray:
        """Return (N,) int64, exact on every machine; `patch_pairs` are sums of p²."""
        tokens, patches = num_tokens.astype(np.int64), num_patches.astype(np.int64)
        vision = patch_pairs.astype(np.int64) + patches * self.vision_linear
        language = tokens * (tokens + self.linear) + num_targets.astype(np.int64) * self.target
        audio = audio_frames.astype(np.int64) * self.audio
        return language + audio + (vision * round(self.vision * 1024) >> 10)


def balanced_order(costs: np.ndarray, group: int, key: int) -> np.ndarray:
    """Return an order (num_packs,) int64 of packs with these costs; `key` chooses one at random.

    Packs are sorted by cost and cut into blocks of `group`, a power of two; blocks are shuffled,
    and in each, every half of every half … is swapped with its sibling or not. So each aligned run
    of 1, 2, 4, …, `group` packs holds packs that are neighbours by cost. Neighbours that are too
    few for a block, from anywhere among the costs, come last, in smaller blocks.
    """
    assert group > 0 and group & (group - 1) == 0
    left = np.argsort(costs, kind="stable")
    order = [left[:0]]
    while len(left):
        num_blocks, rest = divmod(len(left), group)
        random = hashes(num_blocks + 1, key + group)
        begin = int(random[-1] % np.uint64(num_blocks + 1)) * group
        blocks = np.concatenate([left[:begin], left[begin + rest :]]).reshape(-1, group)
        blocks = blocks[np.argsort(random[:-1], kind="stable")]
        order.append(_flipped(blocks, key).ravel())
        left = left[begin : begin + rest]
        group //= 2
    return np.concatenate(order)


def _flipped(blocks: np.ndarray, key: int) -> np.ndarray:
    """Swap the halves of each block at random, then the halves of each half, and so on."""
    num_blocks, group = blocks.shape
    half = group // 2
    while half:
        halves = blocks.reshape(-1, 2, half)
        swap = hashes(len(halves), key + 8192 * group + half) & np.uint64(1) == 1
        blocks = np.where(swap[:, None, None], halves[:, ::-1], halves)
        half //= 2
    return blocks.reshape(num_blocks, group)
