"""Measure the data package: one command an aspect, each against what others offer, in one run.

    OMP_NUM_THREADS=1 python tools/bench_data.py read
    OMP_NUM_THREADS=1 python tools/bench_data.py plan --samples 400000

CPU time of one core, medians; each command's --help says what it compares.
"""

import importlib

import click

COMMANDS = ("read", "images", "plan", "memory", "write")


@click.group(help=__doc__)
def main() -> None:
    pass


for name in COMMANDS:
    main.add_command(importlib.import_module(f"bench_data_{name}").main, name)

if __name__ == "__main__":
    main()
