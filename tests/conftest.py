"""What must hold before any test runs."""

import gc

import pytest
import torch

# The longest, which no worker shall begin when the other has nothing left; then all that start
# ranks, and what takes a second or two at the end. xdist's own order begins with the files of most
# tests.
FIRST = (
    "tests/stages/test_combinations.py",
    "tests/models/test_families.py",
    "tests/hostile/",
    "tests/kernels/test_interpreted.py",
    "tests/data/test_workers.py",
    "tests/stages/",
    "tests/tools/",
    "tests/core/",
    "tests/models/",
)

# Autograd decides at its first backward whether it starts threads, and finds devices for them once
# torch.compile was used: after that no forked rank (tests/ranks.py) could run a backward.
torch.ones((), requires_grad=True).backward()


def pytest_runtest_setup() -> None:
    """What the tests of a file draw is the same in every run."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What is imported stays: a collection takes a third of a second to look through it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of FIRST, for `--no-loadscope-reorder`; tests of a file stay in theirs."""

    def place(item: pytest.Item) -> int:
        found = [place for place, prefix in enumerate(FIRST) if item.nodeid.startswith(prefix)]
        return min(found, default=len(FIRST))

    items.sort(key=place)
