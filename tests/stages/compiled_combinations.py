"""Run by torchrun on two ranks: steps with compiled layers against those of one rank without.

    torchrun --standalone --nproc_per_node=2 tests/stages/compiled_combinations.py FOLDER MIXTURE

FOLDER has a model, MIXTURE one with experts, and each a `reference`, the pickled step of one rank.
"""

import fcntl
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.stages.combinations import COMPILED, INDUCTOR, MIXTURES, words
from tests.stages.one_step import compare, on_a_rank

compile_with = torch.compile


def main(dense: Path, mixture: Path) -> None:
    torch.set_num_threads(1)
    inductor = partial(compile_fx, inner_compile=partial(in_turn, mixture / "lock"))
    last = None
    for mode, run in [(mode, run) for mode, runs in COMPILED.items() for run in runs]:
        folder = mixture if mode in MIXTURES else dense
        wanted = pickle.loads((folder / "reference").read_bytes())
        # AOTAutograd alone, which cuts forward from backward as it does for Inductor.
        backend = inductor if (mode, run) in INDUCTOR else "aot_eager_decomp_partition"
        if (mode, backend) != last:  # parts of rows are no rows of another length
            torch._dynamo.reset()
        last = mode, backend
        torch.compile = partial(compile_with, backend=backend)
        out = folder / f"compiled {mode} {run}"
        (found,) = on_a_rank(folder, out, [words(mode, run)])
        compare(found, wanted, f"{mode}: {run}")
        sys.stdout.write(f"{mode}: {run}: as one rank\n")
        sys.stdout.flush()
    check_recompiles(mixture)


def in_turn(lock: Path, *args: Any, **kwargs: Any) -> Any:
    """A graph through Inductor, rank by rank: the second finds the first's, which is the same."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return compile_fx_inner(*args, **kwargs)


def check_recompiles(folder: Path) -> None:
    """A row's tokens may go to any experts of either rank: layers are compiled once."""
    from tests.stages.rows import build, forward_of, rows
    from triptych_core.config import RunConfig
    from triptych_core.engine.recompiles import RecompileWatch
    from triptych_core.launch import launch
    from triptych_core.parallel.expert import make_expert_place
    from triptych_core.sections import ParallelConfig
    from triptych_models.experts import ExpertGroup

    torch._dynamo.reset()
    torch.compile = partial(compile_with, backend="aot_eager")  # guards are of what is traced
    place = make_expert_place(ParallelConfig(expert=2), launch(RunConfig(device="cpu")))
    model = build(folder, experts=ExpertGroup(place.group, place.size, place.rank)).train()
    model.compile_layers()
    batch, watch, loads = forward_of(rows()[0]), RecompileWatch(), []
    ids = torch.Generator().manual_seed(place.rank)
    for _ in range(4):
        batch["input_ids"].random_(20, generator=ids)
        output = model(**batch)
        output.loss_sum.backward()
        loads.append(output.metrics["expert_load"].tolist())
        if len(loads) == 1:
            watch.news()
    assert len({str(load) for load in loads}) == 4, "must go to other experts"
    assert not watch.news()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
