"""Shards for stages/diffusion.py out of scikit-learn's 1,797 handwritten digits, 8×8 pixels each.

Pixels, from -1 to 1, stand for latents: no autoencoder is needed. Every tenth digit is held out.

    python tools/make_digit_latents.py runs/digit_latents
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from triptych_data.tensors.write import write_tensor_shards


def make_shards(output: Path) -> None:
    """Write output/train and output/heldout."""
    digits = load_digits()
    latents = torch.from_numpy(digits.images.astype(np.float32)[:, None] / 8 - 1)  # (1797, 1, 8, 8)
    for name, chosen in (("train", lambda i: i % 10), ("heldout", lambda i: i % 10 == 0)):
        rows = [i for i in range(len(latents)) if chosen(i)]
        samples = ((words(int(digits.target[i])), {"latents": latents[i]}) for i in rows)
        write_tensor_shards(samples, output / name, overwrite=True)


def words(digit: int) -> dict[str, int | str]:
    """What a sample's JSON says of a digit, to models of classes and of text."""
    return {"label": digit, "text": f"the digit {digit}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    make_shards(parser.parse_args().output)
