"""Checkpoints and shards with seeded damage: found by file name, and never loaded."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from tests.data import test_corruptions as of_shards
from tests.data.chats import make_shards
from tests.faults.outcome import Outcome
from tests.faults.toy import on_ranks, train_toy

CHECKPOINTS, SHARDS = 7000, 3000  # trials
Files = dict[Path, bytes]


def lose(chance: random.Random, path: Path, files: Files) -> dict[Path, bytes | None]:
    return {path: None}


def swap_with_the_other_step(
    chance: random.Random, path: Path, files: Files
) -> dict[Path, bytes | None]:
    """The same file of another checkpoint: whole, but of another time."""
    (other,) = [p for p in files if p.name == path.name and p.parent != path.parent]
    return {path: files[other]}


def swap_with_the_other_rank(
    chance: random.Random, path: Path, files: Files
) -> dict[Path, bytes | None]:
    """The same kind of file of another rank."""
    kin = [p for p in files if p.parent == path.parent and p.name[:4] == path.name[:4]]
    return {path: files[chance.choice(kin)]}


CORRUPTIONS: list[Callable[..., dict[Path, bytes | None]]] = [
    of_shards.flip_a_bit,
    of_shards.flip_a_bit,
    of_shards.flip_many,
    of_shards.truncate,
    of_shards.append,
    of_shards.zero_a_stretch,
    of_shards.repeat_a_block,
    of_shards.lose_a_block,
    of_shards.exchange_blocks,
    of_shards.noise,
    of_shards.empty,
    lose,
    swap_with_the_other_step,
    swap_with_the_other_rank,
]


def damaged_checkpoints(folder: Path, short: bool) -> Outcome:
    """The newest of two checkpoints is damaged: the other one is taken, and the file is named."""
    run_dir, found = folder / "run", folder / "found"
    assert not any(
        on_ranks(partial(train_toy, run_dir, 4, "checkpoint.keep=9"), folder / "run.txt")
    )
    trials = 280 if short else CHECKPOINTS
    codes = on_ranks(partial(_damage, run_dir, trials, found), folder / "said.txt", 1, timeout=3600)
    assert codes == [0], (folder / "said.txt").read_text()
    return Outcome(**json.loads(found.read_text()))


def _damage(run_dir: Path, trials: int, found: Path) -> None:
    from triptych_core.checkpoint.folders import checkpoints
    from triptych_core.checkpoint.load import newest_whole

    outcome, chance = Outcome(), random.Random(0)
    older, newer = checkpoints(run_dir)
    files = {path: path.read_bytes() for path in sorted(run_dir.glob("checkpoints/*/*"))}
    mine = [path for path in files if path.parent == newer]
    while outcome.trials < trials:
        corrupt = CORRUPTIONS[outcome.trials % len(CORRUPTIONS)]
        path = chance.choice(mine)
        (data,) = corrupt(chance, path, files).values()
        if _means_the_same(path, data, files[path]):
            continue
        path.unlink() if data is None else path.write_bytes(data)
        said = io.StringIO()
        with redirect_stdout(said):
            taken = newest_whole([older, newer])
        path.write_bytes(files[path])
        what = f"trial {outcome.trials}, {corrupt.__name__} of {path.name}: {said.getvalue()}"
        outcome.add(
            what,
            detected=_to_name(corrupt, path) in said.getvalue(),
            recovered=taken == older,
            wrong=taken != older,
        )
    found.write_text(json.dumps(vars(outcome)))


def _to_name(corrupt: Callable[..., object], path: Path) -> str:
    """Of a manifest that is whole, but another's, the first file that is not its own."""
    is_anothers = corrupt is swap_with_the_other_step and path.name == "manifest.json"
    return f"{path.parent}/" if is_anothers else f"{path}: "


def _means_the_same(path: Path, data: bytes | None, was: bytes) -> bool:
    """No damage: the same bytes, or a manifest in which one blank became another."""
    return data == was or (
        data is not None and path.suffix == ".json" and data.split() == was.split()
    )


def damaged_shards(folder: Path, short: bool) -> Outcome:
    """Shards and their indexes: a reader refuses or reads what was there, `verify` names all."""
    from triptych_data.shards.verify import verify_shards

    outcome, chance = Outcome(), random.Random(1)
    make_shards(folder, count=12, samples_per_shard=4)
    shards = folder / "shards"
    files = {path: path.read_bytes() for path in sorted(shards.iterdir())}
    sound = of_shards.read_all(shards)
    while outcome.trials < (160 if short else SHARDS):
        corrupt = of_shards.CORRUPTIONS[outcome.trials % len(of_shards.CORRUPTIONS)]
        changed = corrupt(chance, chance.choice(list(files)), files)
        changed = {path: data for path, data in changed.items() if data != files[path]}
        if not changed:
            continue
        for path, data in changed.items():
            path.write_bytes(data)
        stems = {path.name.partition(".tar")[0] for path in changed}
        try:
            wrong = of_shards.read_all(shards) != sound
            named = True
        except ValueError as error:
            wrong, named = False, any(stem in str(error) for stem in stems)
        report = verify_shards(shards)
        named &= any(stem in problem.path for problem in report.problems for stem in stems)
        names = [path.name for path in changed]
        what = f"trial {outcome.trials}, {corrupt.__name__} of {names}"
        outcome.add(what, detected=named, recovered=not wrong, wrong=wrong)
        for path in changed:
            path.write_bytes(files[path])
    shutil.rmtree(folder)
    folder.mkdir()
    return outcome
