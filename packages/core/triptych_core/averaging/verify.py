"""An average read again: finite everywhere, and what its inputs give in fp64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych_core.averaging.combine import BLOCK
from triptych_core.averaging.direct import Landing
from triptych_core.averaging.hf_folder import open_hf_folder, read_json
from triptych_core.averaging.job import FACTS
from triptych_core.averaging.layout import Slot
from triptych_core.averaging.plan import Plan, describe_file, make_plan
from triptych_core.averaging.recipe import Recipe
from triptych_core.averaging.sources import open_source
from triptych_core.averaging.stored import Reader, Source, Stored
from triptych_core.averaging.stretch import Terms, terms_of


def verify_output(folder: Path, full: bool = False) -> str:
    """Check an average; returns what was found, in words.

    Of each tensor one stretch of 65,536 elements, at a place that its name chooses, is computed
    again from the inputs in fp64; with `full`, all are. Every number must be finite.

    Raises:
        ValueError: it is not what averaging.json says, or the inputs are others than they were.
    """
    facts = read_json(folder / FACTS) if (folder / FACTS).is_file() else None
    if facts is None:
        raise ValueError(f"{folder}: must hold {FACTS}, got none; name an average")
    output = open_hf_folder(folder)
    for name, record in facts["output"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != record["bytes"]:
            raise ValueError(
                f"{folder / name}: must have {record['bytes']} bytes, got another size or none; "
                "average again"
            )
    plan = _plan_again(facts)
    _check_layout(folder, output, plan)
    worst, compared = 0.0, 0
    with Reader() as reader:
        reader.open([output, *plan.sources])
        for shard in plan.shards:
            for slot in shard.slots:
                _check_finite(folder, output.tensors[slot.name], slot, reader)
                terms = terms_of(plan, slot.name, reader)
                for begin, end in _chosen(slot, full):
                    error = _error(plan, output, slot, terms, begin, end, reader)
                    if not error <= 1:
                        raise ValueError(
                            f"{folder}: {slot.name} must be what the inputs give in elements "
                            f"{begin} to {end}, got {error:.3g} times the error that rounding "
                            "allows; average again"
                        )
                    worst, compared = max(worst, error), compared + end - begin
    return (
        f"{folder}: {len(output.tensors)} tensors are finite; {compared:,} elements computed again "
        f"in fp64 are within {worst:.2f} of what rounding allows"
    )


def _plan_again(facts: dict[str, Any]) -> Plan:
    like = Path(facts["like"]) if facts["like"] else None
    sources = []
    for record in facts["inputs"]:
        path = Path(record["path"])
        for name, known in record["files"].items():
            file = path / name
            if not file.is_file() or describe_file(file, "sha256" in known) != known:
                raise ValueError(
                    f"{file}: must be the file that was averaged, got another or none; put it back"
                )
        sources.append(open_source(path, like))
    return make_plan(sources, Recipe.from_json(facts["recipe"]), facts["max_shard_bytes"])


def _check_layout(folder: Path, output: Source, plan: Plan) -> None:
    wanted = {slot.name: (slot.dtype, slot.shape) for shard in plan.shards for slot in shard.slots}
    found = {name: (stored.dtype, stored.shape) for name, stored in output.tensors.items()}
    names = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if names:
        raise ValueError(
            f"{folder}: must hold the tensors of its inputs, got others for {names[:5]}; average "
            "again"
        )


def _check_finite(folder: Path, stored: Stored, slot: Slot, reader: Reader) -> None:
    if not stored.dtype.is_floating_point:
        return
    buffer = Landing((1 << 20) * stored.dtype.itemsize)
    for begin in range(0, stored.size, 1 << 20):
        part = reader.read(stored, begin, min(begin + (1 << 20), stored.size), buffer)
        # A sum passes NaN and infinity on, and costs less than a look at every element.
        if not part.float().sum().isfinite() and not part.isfinite().all():
            raise ValueError(
                f"{folder}: {slot.name} must be finite, got NaN or infinity from element {begin} "
                "on; average again"
            )


def _chosen(slot: Slot, full: bool) -> Iterator[tuple[int, int]]:
    size = slot.num_bytes // slot.dtype.itemsize
    begins = range(0, size, BLOCK)
    if not full and len(begins) > 1:
        begin = random.Random(slot.name).randrange(0, size - BLOCK + 1)
        begins = range(begin, begin + 1)
    for begin in begins:
        yield begin, min(begin + BLOCK, size)


def _error(
    plan: Plan, output: Source, slot: Slot, terms: Terms, begin: int, end: int, reader: Reader
) -> float:
    """Largest error of a stretch, in units of what rounding to fp32 steps and output allows."""

    def load(tensor: Stored) -> Tensor:
        buffer = Landing((end - begin) * tensor.dtype.itemsize)
        return reader.read(tensor, begin, end, buffer)

    inputs = [load(source.tensors[slot.name]) for source in plan.sources]
    found = load(output.tensors[slot.name])
    if terms.copied is not None:
        same = torch.equal(found, inputs[terms.copied].to(found.dtype))
        return 0.0 if same else float("inf")
    wanted, magnitude = _reference(plan.recipe, terms, [tensor.double() for tensor in inputs])
    steps = 2 * (len(inputs) + 3)  # roundings to fp32 on the way of an element, generously
    allowed = magnitude * steps * 2.0**-24 + wanted.abs() * torch.finfo(found.dtype).eps * 0.5
    allowed += torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    return float(((found.double() - wanted).abs() / allowed).max())


def _reference(recipe: Recipe, terms: Terms, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The stretch in fp64, and the sum of the sizes of what it is made of."""
    if not recipe.has_base:
        addends = [weight * x for weight, x in zip(terms.weights, inputs, strict=True)]
        return _sum(addends), _sum([addend.abs() for addend in addends])
    base, *others = inputs
    unsure = torch.zeros_like(base, dtype=torch.bool)
    changes = [x - base for x in others]
    if recipe.method == "ties":
        changes = [
            change.where(change.float().abs() >= threshold, 0)
            for change, threshold in zip(changes, terms.thresholds, strict=True)
        ]
    addends = [weight * change for weight, change in zip(terms.weights, changes, strict=True)]
    size = base.abs() + abs(recipe.scale) * _sum([addend.abs() + base.abs() for addend in addends])
    total = _sum(addends)
    if recipe.method == "ties":
        signed = total
        agrees = [change.sign() == signed.sign() for change in changes]
        counts = _sum([w * agree for w, agree in zip(terms.weights, agrees, strict=True)])
        total = _sum([a * agree for a, agree in zip(addends, agrees, strict=True)])
        total = torch.where(total == 0, 0, total / counts)
        # Rounding to fp32 may choose the sign of a sum that is all but zero.
        sizes = _sum([addend.abs() for addend in addends])
        unsure = (sizes > 0) & (signed.abs() <= 1e-5 * sizes)
    return base + recipe.scale * total, size.masked_fill(unsure, torch.inf)


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)
