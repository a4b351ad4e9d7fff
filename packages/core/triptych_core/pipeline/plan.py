"""From a recipe and the words of a command line to steps that know all they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from triptych_core.config import did_you_mean, read_tree
from triptych_core.pipeline.arguments import Argument, read_arguments
from triptych_core.pipeline.config import Kind, RecipeConfig, StepConfig, read_recipe
from triptych_core.pipeline.references import find_references, replace_references, written

# The keys of a stage that hold a path of a certain kind; a reference must give that.
WANTED: dict[str, Kind] = {"model.path": "model", "shards": "shards"}


@dataclass(frozen=True)
class Output:
    """What a step leaves: its kind, and where."""

    kind: Kind
    path: Path


@dataclass(frozen=True)
class Step:
    """One step of a recipe, its references resolved.

    given: what the recipe says it shall do, flat, with references to paths as they are written
    inputs: what it reads, by reference or path as written; outputs of earlier steps may not exist
    words: the command without its launcher
    starts_from: the earlier steps that it names
    """

    name: str
    about: str
    is_stage: bool
    folder: Path
    words: list[str]
    ranks: int | None
    given: dict[str, Any]
    inputs: dict[str, Path]
    outputs: dict[str, Output]
    starts_from: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A recipe that can be run: its name, where scripts are, where it writes, and its steps."""

    name: str
    about: str
    root: Path
    dir: Path
    launcher: list[str]
    steps: dict[str, Step]
    needed: dict[str, set[str]]  # outputs of each step that a later one reads

    def after(self, name: str) -> list[str]:
        """This step and all that start from it, directly or not, in the order they run."""
        found = {name}
        for step in self.steps.values():
            if found.intersection(step.starts_from):
                found.add(step.name)
        return [each for each in self.steps if each in found]


def make_plan(path: Path, words: Sequence[str], run_dir: Path | None = None) -> Plan:
    """Read a recipe and settle every reference, argument and path in it; runs nothing.

    Args:
        path: the recipe.
        words: `argument=value`, and `step.key=value` for a key of a stage.
        run_dir: where all is written; by default runs/NAME from here.

    Raises:
        ValueError: one line per mistake.
    """
    recipe = read_recipe(path)
    root = find_root(path, recipe)
    mine, overrides = _sort_words(recipe, words)
    arguments = read_arguments(recipe.arguments, mine, root)
    folder = (run_dir or Path("runs") / path.stem).absolute()
    _check_order(recipe)
    make = partial(_make_step, recipe, root, folder, arguments)
    steps = {name: make(name, step, overrides.get(name, [])) for name, step in recipe.steps.items()}
    needed: dict[str, set[str]] = {name: set() for name in steps}
    for step in recipe.steps.values():
        for name, output in find_references([step.set, step.run]):
            if name in needed and output:
                needed[name].add(output)
    return Plan(path.stem, recipe.about, root, folder, recipe.launcher, steps, needed)


def find_root(path: Path, recipe: RecipeConfig) -> Path:
    """The nearest folder, from the recipe's own upwards, that holds all its scripts."""
    files = [str(f) for s in recipe.steps.values() for f in (s.stage, s.config, _script(s)) if f]
    folders = [path.absolute().parent, *path.absolute().parent.parents]
    lacking = {folder: [f for f in files if not (folder / f).is_file()] for folder in folders}
    root = min(folders, key=lambda folder: len(lacking[folder]))
    if lacking[root]:
        raise ValueError(
            "\n".join(
                f"{path}: must name files below its folder or one above it, got {file}; "
                f"no such file in {root}"
                for file in dict.fromkeys(lacking[root])
            )
        )
    return root


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections; an empty one is a value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _script(step: StepConfig) -> str | None:
    first = str(step.run[0]) if step.run else ""
    return first if first.endswith(".py") else None


def _sort_words(
    recipe: RecipeConfig, words: Sequence[str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Arguments of the recipe, and overrides of each stage."""
    mine: dict[str, str] = {}
    overrides: dict[str, list[str]] = {}
    for word in words:
        key, is_given, value = word.partition("=")
        name, dot, rest = key.partition(".")
        known = recipe.steps if dot else recipe.arguments
        if not is_given or name not in known:
            names = [*recipe.arguments, *(f"{step}." for step in recipe.steps)]
            raise ValueError(
                f"{word}: must be argument=value or step.key=value, got '{key}'"
                f"{did_you_mean(f'{name}{dot}', names)}"
            )
        if not dot:
            mine[name] = value
        elif recipe.steps[name].stage:
            overrides.setdefault(name, []).append(f"{rest}={value}")
        else:
            raise ValueError(f"{word}: must be a key of a stage, got {name}, which is a command")
    return mine, overrides


def _check_order(recipe: RecipeConfig) -> None:
    """Every reference is to an argument or to an output of an earlier step."""
    graph = {}
    for name, step in recipe.steps.items():
        graph[name] = {n for n, _ in find_references([step.set, step.run]) if n in recipe.steps}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " → ".join(reversed(error.args[1]))
        raise ValueError(f"steps: must not start from each other, got {circle}") from None
    mistakes: list[str] = []
    seen: set[str] = set()
    for name, step in recipe.steps.items():
        for reference in find_references([step.set, step.run, [step.ranks]]):
            mistakes += _mistake(recipe, name, reference, seen)
        mistakes += _repeated(name, step)
        mistakes += _ill_typed(recipe, name, step)
        seen.add(name)
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))


def _mistake(
    recipe: RecipeConfig, at: str, reference: tuple[str, str | None], seen: set[str]
) -> list[str]:
    """What is wrong with a reference, in a line."""
    name, output = reference
    where, what = f"steps.{at}: {written(name, output)}", ""
    if output is None:
        known = [*recipe.arguments, "dir"]
        if name in recipe.steps:
            what = f"must name an output, got the step alone; known: {', '.join(known)}"
            what += f", {name}.{f', {name}.'.join(recipe.steps[name].outputs)}"
        elif name not in known:
            what = f"must be an argument, got '{name}'{did_you_mean(name, known)}"
    elif name not in recipe.steps:
        what = f"must be of a step, got '{name}'{did_you_mean(name, list(recipe.steps))}"
    elif output not in recipe.steps[name].outputs:
        known = list(recipe.steps[name].outputs)
        what = f"must be an output of {name}, got '{output}'{did_you_mean(output, known)}"
    elif name not in seen:
        what = f"must be of an earlier step, got {name}, which comes later; move it up"
    return [f"{where} {what}"] if what else []


def _repeated(at: str, step: StepConfig) -> list[str]:
    """Keys that stand twice, dotted and in a section: a merged YAML can bring one along."""
    keys = [key for key, _ in flatten(step.set)]
    return [
        f"steps.{at}.set.{key}: must stand once, got it dotted and in a section; drop one"
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1
    ]


def _ill_typed(recipe: RecipeConfig, at: str, step: StepConfig) -> list[str]:
    """References of a kind that a key cannot take."""
    found = []
    for key, value in flatten(step.set):
        wanted = WANTED.get(key) or WANTED.get(key.rpartition(".")[2])
        for name, output in find_references(value):
            kind: str | None = None
            if output and name in recipe.steps and output in recipe.steps[name].outputs:
                kind = recipe.steps[name].outputs[output][0]
            elif name in recipe.arguments:
                kind = recipe.arguments[name].kind
            if wanted and kind not in (None, wanted, "text"):
                found.append(
                    f"steps.{at}.set.{key}: must be {wanted}, got {written(name, output)}, "
                    f"which is {kind}; name another output"
                )
    return found


def _make_step(
    recipe: RecipeConfig,
    root: Path,
    run_dir: Path,
    arguments: dict[str, Argument],
    name: str,
    step: StepConfig,
    overrides: list[str],
) -> Step:
    """Settle one step, whose references are known to be right."""
    folder = run_dir / name

    def path_of(other: str, output: str | None) -> Any:
        if output is not None:
            return str(run_dir / other / recipe.steps[other].outputs[output][1])
        return str(folder) if other == "dir" else arguments[other].value

    def as_written(other: str, output: str | None) -> Any:
        is_path = output is not None or other == "dir" or arguments[other].path is not None
        return written(other, output) if is_path else arguments[other].value

    references = dict.fromkeys(find_references([step.set, step.run]))
    inputs = {
        written(*reference): Path(path_of(*reference))
        for reference in references
        if reference[1] or (reference[0] != "dir" and arguments[reference[0]].path)
    }
    ranks = replace_references(step.ranks, path_of)
    if step.stage:
        config = root / step.config if step.config else None
        kept = [*_dotted(replace_references(step.set, as_written)), *overrides]
        tree = dict(flatten(read_tree(config, kept)))
        given = {"stage": step.stage, **tree}
        settled = [*_dotted(replace_references(step.set, path_of)), *overrides]
        words = [step.stage, *([f"--config={step.config}"] if step.config else [])]
        words += [*settled, f"run.dir={folder}"]
        inputs |= _paths_in(tree.values(), root)
    else:
        given = {"run": replace_references(step.run, as_written)}
        words = [str(word) for word in replace_references(step.run, path_of)]
        inputs |= _paths_in(given["run"][1:], root)
    given["ranks"] = ranks or ("all" if step.stage else 1)
    if ranks is not None and (not isinstance(ranks, int) or ranks < 1):
        raise ValueError(f"steps.{name}.ranks: must be a number of processes, got {ranks!r}")
    return Step(
        name=name,
        about=step.about,
        is_stage=bool(step.stage),
        folder=folder,
        words=words,
        ranks=ranks,
        given=given,
        inputs=inputs,
        outputs={key: Output(kind, folder / at) for key, (kind, at) in step.outputs.items()},
        starts_from=tuple(dict.fromkeys(other for other, output in references if output)),
    )


def _dotted(tree: dict[str, Any]) -> list[str]:
    """Settings as overrides, `a.b=value`."""
    return [f"{key}={_as_yaml(value)}" for key, value in flatten(tree)]


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _paths_in(values: Iterable[Any], root: Path) -> dict[str, Path]:
    """The texts among values that are files or folders; references are none."""
    found = {}
    for value in values:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip("./") and len(text) < 4096:
                path = root / text
                if path.exists():
                    found[text] = path
    return found
