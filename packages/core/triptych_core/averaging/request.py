"""What a user may ask for, from method names and paths to a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from triptych_core.averaging import coefficients
from triptych_core.averaging.job import Job
from triptych_core.averaging.recipe import Method, Recipe, dtype_name
from triptych_core.averaging.sources import expand, in_order, open_source, take_last
from triptych_core.averaging.stored import Source

_RECIPES: dict[str, Method] = {
    "uniform": "linear",
    "greedy": "linear",
    "weighted": "linear",
    "ema": "linear",
    "window": "linear",
    "task-arithmetic": "task-arithmetic",
    "ties": "ties",
    "slerp": "slerp",
}


@dataclass(frozen=True)
class Request:
    """The options of tools/average_checkpoints.py, which describes them."""

    inputs: tuple[Path, ...]
    output: Path
    method: str = "uniform"
    weights: tuple[float, ...] | None = None
    normalize: bool = False
    decay: float = 0.9
    curve: str = "linear"
    base: Path | None = None
    scale: float = 1.0
    density: float = 0.2
    position: float = 0.5
    evaluate: str | None = None
    lower_is_better: bool = False
    last: int | None = None
    spacing: int | None = None
    window: int | None = None
    module_weights: tuple[tuple[str, tuple[float, ...]], ...] = ()
    exclude: tuple[str, ...] = ()
    copy_from: Path | None = None
    dtype: str = "same"
    keep_fp32: tuple[str, ...] = ()
    like: Path | None = None
    max_memory: int = 1 << 30
    max_shard_size: int = 5 << 30
    threads: int = 4
    check: bool = False
    sha256: bool = False


def make_job(request: Request, words: str = "") -> Job:
    """Open the inputs, choose among them and find out what each counts.

    Raises:
        ValueError: an input is broken or of no known kind, or an option does not fit.
    """
    _check_numbers(request)
    sources = _sources(request)
    weights = _weights(request, sources)
    modules = tuple(
        (pattern, _given(numbers, len(sources), request))
        for pattern, numbers in request.module_weights
    )
    if request.base is not None:
        sources = [open_source(request.base, request.like, request.check), *sources]
    recipe = Recipe(
        method=_RECIPES[request.method],
        weights=tuple(weights),
        scale=request.scale,
        density=request.density,
        position=request.position,
        module_weights=modules,
        excluded=request.exclude,
        copy_from=_number_of(request.copy_from, sources),
        dtype=dtype_name(request.dtype),
        keep_fp32=request.keep_fp32,
    )
    return Job(
        sources,
        recipe,
        request.output,
        request.like,
        request.max_memory,
        request.max_shard_size,
        request.threads,
        request.sha256,
        words,
    )


def _check_numbers(request: Request) -> None:
    if not 0 <= request.decay < 1:
        raise ValueError(f"--decay: must be from 0 to below 1, got {request.decay}; try 0.9")
    if not 0 < request.density <= 1:
        raise ValueError(f"--density: must be above 0, to 1, got {request.density}; try 0.2")
    has_base = request.method in ("task-arithmetic", "ties")
    if has_base and request.base is None:
        raise ValueError(
            f"--base: must be given for {request.method}, got none; name what the inputs were "
            "tuned from"
        )
    if request.method == "greedy":
        if request.evaluate is None:
            raise ValueError(
                "--evaluate: must be given for greedy, got none; name a command that prints a score"
            )
        if request.copy_from:
            raise ValueError(
                f"--copy-from: must not come with greedy, which chooses its inputs, got "
                f"{request.copy_from}; leave it out"
            )
    if request.module_weights and request.method in ("greedy", "slerp"):
        raise ValueError(
            "--module-weights: must come with a method that weighs inputs, got it with "
            f"{request.method}; choose another method"
        )
    if request.method == "ties" and min(request.weights or (1,)) < 0:
        raise ValueError(
            f"--weights: must not be negative for ties, got {min(request.weights or ())}; take "
            "task-arithmetic to subtract"
        )
    if request.method == "weighted" and request.weights is None:
        raise ValueError("--weights: must be given for weighted, got none; one for each input")


def _sources(request: Request) -> list[Source]:
    paths = expand(request.inputs)
    sources = [open_source(path, request.like, request.check) for path in paths]
    if request.last or request.spacing or request.window:
        sources = take_last(sources, request.last, request.spacing, request.window)
    if request.method in ("ema", "window"):
        sources = in_order(sources)
    number = len(sources)
    if request.method == "slerp" and number != 2:
        raise ValueError(f"INPUTS: must be two for slerp, got {number}; name two")
    if number < 2 and request.base is None:
        raise ValueError(
            f"INPUTS: must be two or more, got {number}; name others, or a run that saved more"
        )
    return sources


def _weights(request: Request, sources: list[Source]) -> list[float] | tuple[float, ...]:
    number = len(sources)
    if request.method == "ema":
        return coefficients.ema(request.decay, number)
    if request.method == "window":
        steps = [source.step for source in sources if source.step is not None]
        known = len(set(steps)) == number
        return coefficients.window(request.curve, steps if known else range(number))
    if request.weights is not None:
        return _given(request.weights, number, request)
    if request.method == "task-arithmetic":
        return [1.0] * number  # task vectors are added up
    return coefficients.uniform(number)


def _given(weights: tuple[float, ...], number: int, request: Request) -> tuple[float, ...]:
    sums_to_one = request.method not in ("task-arithmetic", "ties")
    return tuple(coefficients.weighted(weights, number, request.normalize, sums_to_one=sums_to_one))


def _number_of(path: Path | None, sources: list[Source]) -> int:
    if path is None:
        return 0
    for number, source in enumerate(sources):
        if path.exists() and source.path.samefile(path):
            return number
    raise ValueError(
        f"--copy-from: must be one of the inputs, got {path}; name it as among "
        f"{', '.join(str(source.path) for source in sources)}"
    )
