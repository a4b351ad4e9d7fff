"""Who consumed which samples at which step: written while training, checked afterwards.

`ledger/rank-00000.jsonl` has one line per optimizer step of a rank:

    {"step": 7, "position": 448, "packs": [{"position": 384, "end": 401, "epoch": 0,
     "keys": ["000012", …], "ids": [12, …],
     "holes": [["000007", "web", "corrupt image", "…", 7]]}, …]}

`position` of a line counts the samples that all ranks had consumed after the step; `position` and
`end` of a pack those before it and those before the next pack of the global order. Keys are for
people; ids count through the sources, and so differ where two shards use the same key.

Where rows are joined with samples of other shards (`tensors.joined`), a line says as much of these:
`"joined": {"generation": {"position": 32, "packs": [{…, "epochs": [0, 0, 1]}]}}`. Their packs may
hold the end of an epoch and the begin of the next: `epochs` are those of `ids`, then of `holes`.
`python -m triptych_data.plan.ledger runs/x/ledger` checks a run.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych_data.shards.index import write_whole

Batch = dict[str, Any]


class Ledger:
    """Writes one rank's ledger; a resumed run forgets the steps that it will take again.

    A line is in the file when its step ends, so it outlives a killed process.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, start_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Ranks cut their own files; those of ranks that are no more are left to the first.
        for path in sorted(folder.glob("rank-*.jsonl")):
            number = int(path.stem.removeprefix("rank-"))
            if number == rank or (rank == 0 and number >= world_size):
                _cut(path, start_step)
        self._file = (folder / f"rank-{rank:05d}.jsonl").open("a", encoding="utf-8")
        self._taken: dict[str, dict[str, Any]] = {}  # by stream, rows' is ""

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, noting what is in each one that is taken."""
        for batch in batches:
            for stream, labels in batch.get("streams", {"": batch}).items():
                taken = self._taken.setdefault(stream, {"packs": []})
                taken["position"] = labels["place"].next_position
                taken["packs"].append(_pack(labels))
            yield batch

    def write(self, step: int) -> None:
        """Write the line of a step: all packs taken since the step before."""
        joined = dict(self._taken)
        line = {"step": step, **joined.pop("", {"position": 0, "packs": []})}
        if joined:
            line["joined"] = joined
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        self._taken = {}


@dataclass
class Audit:
    """What the ledgers of a run say: counts, and what is wrong with them."""

    steps: int = 0
    samples: int = 0
    holes: int = 0
    left_out: int = 0
    """samples too long or refused, which the plan leaves out"""
    epochs: int = 0
    joined: dict[str, "Audit"] = field(default_factory=dict)
    """of what rows were joined with, by name; its problems stand among all"""
    problems: list[str] = field(default_factory=list)


def audit(folder: Path, *, once_per_epoch: bool = True) -> Audit:
    """Check the ledgers of all ranks of a run against each other.

    In the global order each pack must begin where the one before ended: then nothing the plan gave
    was lost or taken twice, whatever the number of ranks. With `once_per_epoch`, which holds for
    mixtures without weights or repeats, no sample may occur twice in an epoch, and all finished
    epochs must have the same ones.

    Raises ValueError if there is no ledger.
    """
    paths = sorted(folder.glob("rank-*.jsonl"))
    if not paths:
        raise ValueError(
            f"{folder}: must hold rank-*.jsonl, got none; set data.ledger=true for a run"
        )
    lines = [line for path in paths for line in read_ledger(path)]
    found = _audit(lines, once_per_epoch=once_per_epoch)
    for name in sorted({name for line in lines for name in line.get("joined", {})}):
        parts = [
            {"step": line["step"], **line["joined"][name]}
            for line in lines
            if name in line.get("joined", {})
        ]
        found.joined[name] = _audit(parts, once_per_epoch=True)
        found.problems += [f"{name}: {problem}" for problem in found.joined[name].problems]
    return found


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the lines of one rank; a last one that a killed run left unfinished is dropped."""
    return [json.loads(line) for line in _whole_lines(path)]


def _pack(labels: Batch) -> dict[str, Any]:
    place = labels["place"]
    pack = {
        "position": place.position,
        "end": place.end,
        "epoch": place.epoch,
        "keys": labels["sample_keys"],
        "ids": labels["sample_ids"],
        "holes": labels["holes"],
    }
    return pack | ({"epochs": labels["sample_epochs"]} if "sample_epochs" in labels else {})


def _audit(lines: list[dict[str, Any]], *, once_per_epoch: bool) -> Audit:
    """Of one stream."""
    packs = sorted((pack for line in lines for pack in line["packs"]), key=_position)
    samples = sum(len(pack["keys"]) for pack in packs)
    holes = sum(len(pack["holes"]) for pack in packs)
    found = Audit(
        steps=len({line["step"] for line in lines}),
        samples=samples,
        holes=holes,
        left_out=sum(pack["end"] - pack["position"] for pack in packs) - samples - holes,
        epochs=len({epoch for pack in packs for epoch, _ in _taken(pack)}),
    )
    found.problems += _steps_missing(lines)
    found.problems += _gaps(packs, max((line["position"] for line in lines), default=0))
    if once_per_epoch:
        found.problems += _repeats(packs)
    return found


def _whole_lines(path: Path) -> list[str]:
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return lines


def _cut(path: Path, last_step: int) -> None:
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= last_step]
    write_whole(path, "".join(f"{line}\n" for line in kept).encode())


def _position(pack: dict[str, Any]) -> int:
    return pack["position"]


def _taken(pack: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Epoch and number of every sample that was planned."""
    samples = [*pack["ids"], *(hole[-1] for hole in pack["holes"])]
    return zip(pack.get("epochs", [pack["epoch"]] * len(samples)), samples, strict=True)


def _steps_missing(lines: list[dict[str, Any]]) -> Iterator[str]:
    steps = {line["step"] for line in lines}
    for step in sorted(set(range(1, max(steps, default=0) + 1)) - steps):
        yield f"step {step}: must be in a ledger, got no line"


def _gaps(packs: list[dict[str, Any]], end: int) -> Iterator[str]:
    """What is lost or repeated in the global order of packs."""
    expected = 0
    for pack in packs:
        begin = pack["position"]
        if begin > expected:
            yield f"position {expected}: {begin - expected} samples were lost before {begin}"
        elif begin < expected:
            yield f"position {begin}: {expected - begin} samples were taken again"
        expected = max(expected, pack["end"])
    if expected != end:
        yield f"position {expected}: must be where the last step ended, got {end}"


def _repeats(packs: list[dict[str, Any]]) -> Iterator[str]:
    epochs: dict[int, Counter[int]] = {}
    for pack in packs:
        for epoch, sample in _taken(pack):
            epochs.setdefault(epoch, Counter())[sample] += 1
    finished = sorted(epochs)[:-1]
    every = set[int]().union(*(epochs[epoch] for epoch in finished))
    for epoch, counts in sorted(epochs.items()):
        twice = [sample for sample, count in counts.items() if count > 1]
        if twice:
            yield f"epoch {epoch}: {len(twice)} samples were taken twice, the first is {twice[0]}"
        missing = every - counts.keys()
        if missing and epoch in finished:
            yield f"epoch {epoch}: {len(missing)} samples that other epochs have are missing"


def main(arguments: list[str]) -> int:
    """Print what an audit finds in a ledger folder; returns 0 if nothing is wrong."""
    flags = [word for word in arguments if word.startswith("-")]
    folders = [word for word in arguments if word not in flags]
    if len(folders) != 1 or set(flags) - {"--mixed"}:
        print("usage: python -m triptych_data.plan.ledger RUN/ledger [--mixed]", file=sys.stderr)  # noqa: T201
        return 2
    found = audit(Path(folders[0]), once_per_epoch="--mixed" not in flags)
    print(  # noqa: T201
        f"{found.steps:,} steps, {found.samples:,} samples, {found.holes:,} holes, "
        f"{found.left_out:,} left out, {found.epochs:,} epochs begun"
    )
    for name, other in found.joined.items():
        said = f"{other.samples:,} samples, {other.holes:,} holes, {other.epochs:,} epochs begun"
        print(f"{name}: {said}")  # noqa: T201
    for problem in found.problems:
        print(problem)  # noqa: T201
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
