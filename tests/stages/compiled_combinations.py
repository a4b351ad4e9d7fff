"""Run by torchrun on two ranks: steps with compiled layers against those of one rank without.

    torchrun --standalone --nproc_per_node=2 tests/stages/compiled_combinations.py FOLDER REFERENCE

FOLDER has the model, REFERENCE the pickled step of one rank.
"""

import pickle
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.stages.combinations import COMPILED, words
from tests.stages.one_step import compare, on_a_rank


def main(folder: Path, reference: Path) -> None:
    torch.set_num_threads(1)
    wanted = pickle.loads(reference.read_bytes())
    for mode, runs in COMPILED.items():
        torch._dynamo.reset()  # parts of rows are no rows of another length
        settings = [words(mode, run) for run in runs]
        for run, found in zip(
            runs, on_a_rank(folder, folder / f"compiled {mode}", settings), strict=True
        ):
            compare(found, wanted, f"{mode}: {run}")
            sys.stdout.write(f"{mode}: {run}: as one rank\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
