"""Typed configuration: a pydantic tree per stage, a YAML with what differs, dotted overrides.

Nothing here imports torch, so a misspelt key is refused before any heavy import.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo

from triptych_core.faults.codes import USER_ERROR, EndsRun
from triptych_core.faults.config import LossGuardConfig
from triptych_core.faults.lineage import note_launcher
from triptych_core.parallel.expert_config import check_expert
from triptych_core.parallel.tensor_config import check_tensor
from triptych_core.plan.config import PlanConfig
from triptych_core.replay.config import ReplayConfig
from triptych_core.secrets import mask_tracebacks, masked, masked_tree
from triptych_core.sections import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    Section,
)
from triptych_core.strict_yaml import load_yaml
from triptych_core.verify.config import VerifyConfig


class StageConfig(Section):
    """The sections every stage has; a stage adds its model and data."""

    run: RunConfig = RunConfig()
    engine: EngineConfig = EngineConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    loss_guard: LossGuardConfig = LossGuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    plan: PlanConfig = PlanConfig()
    verify: VerifyConfig = VerifyConfig()
    replay: ReplayConfig = ReplayConfig()

    @model_validator(mode="after")
    def _check_optimizer(self) -> StageConfig:
        if self.optim.name == "muon" and self.engine.zero.offload_optimizer:
            raise ValueError(
                "optim.name: must be adamw with engine.zero.offload_optimizer, got muon; "
                "Newton-Schulz needs the device, switch offloading off"
            )
        if self.optim.state_dtype == "bf16" and self.engine.zero.offload_optimizer:
            raise ValueError(
                "optim.state_dtype: must be fp32 with engine.zero.offload_optimizer, got bf16; "
                "random numbers for the rounding take a host ten times as long as the update"
            )
        return self

    @model_validator(mode="after")
    def _check_tensor(self) -> StageConfig:
        if self.parallel.tensor > 1:
            check_tensor(self.engine, self.optim, self.plan)
        return self

    @model_validator(mode="after")
    def _check_expert(self) -> StageConfig:
        if self.parallel.expert > 1:
            check_expert(self.parallel, self.engine)
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> StageConfig:
        schedule, steps = self.schedule, self.run.steps
        phases = schedule.warmup_steps + (schedule.decay_steps if schedule.kind == "wsd" else 0)
        if phases > steps:
            raise ValueError(
                f"schedule: warmup_steps + decay_steps must be at most run.steps ({steps}), "
                f"got {phases}; shorten them or train longer"
            )
        return self


_MOST_YAML = 1 << 18  # bytes of a configuration; reading one of a megabyte takes seconds

Config = TypeVar("Config", bound=BaseModel)


Stage = TypeVar("Stage", bound=StageConfig)


# What is done instead of training: its key, and what that is by default.
_INSTEAD = {
    "--plan": ("plan.show", "table"),
    "--verify": ("verify.only", "true"),
    "--replay": ("replay.step", "last"),
}
_OPTIONS = ["--config", "--plan", "--json", "--verify", "--replay", "--print-config", "--help"]


def parse_args(cls: type[Config], argv: Sequence[str], description: str = "") -> Config:
    """Read `--config FILE` and `a.b=value` overrides into `cls`; print help or the tree if asked.

    Accepts `--local_rank N`, which DeepSpeed's launcher appends. Exits with status 2 and one line
    per mistake when the user's input is wrong.
    """
    path: Path | None = None
    overrides: list[str] = []
    print_only = False
    words = iter(sorted(argv, key=lambda word: word == "--json"))  # it says how: behind --plan
    for word in words:
        name, _, inline = word.partition("=")
        if word in ("-h", "--help"):
            _say_and_exit(render_help(cls, description) + "\n")
        elif name == "--config":
            path = Path(inline or next(words, ""))
        elif name in ("--local_rank", "--local-rank"):
            _ = inline or next(words, "")
        elif word == "--print-config":
            print_only = True
        elif word == "--json" and "--plan" in argv:
            overrides.append("plan.show=json")
        elif name in _INSTEAD:
            key, value = _INSTEAD[name]
            overrides.append(f"{key}={inline or value}")
        elif word.isdigit() and overrides[-1:] == ["replay.step=last"]:
            overrides[-1] = f"replay.step={word}"
        elif not word.startswith("-") and "=" in word:
            overrides.append(word)
        else:
            near = did_you_mean(name, _OPTIONS)
            die([f"{word}: must be an option or section.key=value, got '{word}'{near}"])
    try:
        config = load_config(cls, path, overrides)
    except ValueError as error:
        die(str(error).splitlines())
    if print_only:
        _say_and_exit(dump_config(config))
    return config


def load_config(
    cls: type[Config], path: Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Build `cls` from a YAML file and dotted overrides (`optim.lr=1e-5`), overrides last.

    Raises:
        ValueError: one line per mistake, each `<dotted path>: <what must hold>, got <value>; …`.
    """
    tree = read_tree(path, overrides)
    unknown = list(_unknown_keys(cls, tree, ""))
    if unknown:
        raise ValueError("\n".join(unknown))
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(map(_one_line, _by_key(error.errors(), tree)))) from None


def read_tree(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file and dotted overrides say, overrides last, before defaults and checks."""
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    return tree


def is_due(step: int, every: int, last_step: int) -> bool:
    """Whether something done every so many steps (0 = never) and at the end is due after `step`."""
    return step == last_step or (every > 0 and step % every == 0)


def dump_config(config: BaseModel) -> str:
    """The whole resolved tree as YAML, without secrets."""
    tree = masked_tree(config.model_dump(mode="json"))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def render_help(cls: type[BaseModel], description: str = "") -> str:
    """Every key of `cls` with its type, default and meaning."""
    lines = [description.strip(), ""] if description else []
    lines += [
        "options:",
        "  --config FILE      a YAML file with what differs from the defaults",
        "  section.key=value  override one key, e.g. optim.lr=1e-5",
        "  --plan             print what a step needs under each ZeRO stage, and exit",
        "  --plan --json      the same, sizes in bytes",
        "  --verify           check this configuration on its first rows, and exit",
        "  --replay [STEP]    run the batch of a step again without its update, by default of the",
        "                     last that was left out, and say what is wrong with it",
        "  --print-config     print the resolved tree and exit",
        "  --help             this text",
        "",
        "keys:",
    ]
    for key, field in _walk_fields(cls, ""):
        default = "required" if field.is_required() else _default_text(field)
        lines.append(f"  {key}: {_type_text(field.annotation)} = {default}")
        if field.description:
            lines.append(f"      {field.description}")
    return "\n".join(lines)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'lr'?` for the nearest known word, or which words there are."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    # Letters that changed places come before others: difflib finds samplre no nearer to sampler
    # than to samples.
    near.sort(key=lambda candidate: sorted(candidate) != sorted(word))
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(sorted(known))}"


def run_main(main: Callable[[Stage], None], config: Stage) -> None:
    """Run a stage; a mistake of the user's ends it with one line instead of a traceback.

    By the rule of the house a `ValueError` raised in our packages is something a user can mend;
    anything else keeps its traceback. What is told has no secrets.
    """
    note_launcher()
    mask_tracebacks()
    if config.run.device == "cpu" or config.plan.show != "no":  # a plan needs no device
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    try:
        main(config)
    except EndsRun as end:
        if os.environ.get("RANK", "0") == "0":
            print(masked(str(end)), file=sys.stderr, flush=True)  # noqa: T201
        os._exit(end.code)  # the other ranks leave at the same step
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        if not raised_in.startswith("triptych_"):
            raise
        print(masked(f"error: {error}"), file=sys.stderr, flush=True)  # noqa: T201
        os._exit(USER_ERROR)  # at once: peers may be waiting for this rank in a collective


def die(lines: Sequence[str]) -> NoReturn:
    """Print the lines once per machine, not once per rank, and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for line in lines:
            print(masked(f"error: {line}"), file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _say_and_exit(text: str) -> NoReturn:
    """Also where who reads has seen enough: `--help | head`."""
    with suppress(BrokenPipeError):
        sys.stdout.write(text)
        sys.stdout.flush()
        sys.exit(0)
    os._exit(0)  # nothing is left to be flushed


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config: must be an existing YAML file, got '{path}'; check the path")
    if path.stat().st_size > _MOST_YAML:
        raise ValueError(
            f"{path}: must have at most {_MOST_YAML} bytes, got {path.stat().st_size}; name a "
            "configuration"
        )
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: must be YAML, got {_mistake(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must hold keys, got {type(tree).__name__}")
    return tree


def _mistake(error: Exception) -> str:
    """What is wrong and where, without the line itself: it may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = getattr(error, "problem", None) or "a mistake"
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, _, text = override.partition("=")
    *parents, last = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(
                f"{dotted}: must be below a section, got '{parent}' = {_shown(parent, child)}"
            )
        node = child
    try:
        node[last] = load_yaml(text)
    except (yaml.YAMLError, ValueError, TypeError):
        raise ValueError(
            f"{dotted}: must be a YAML value, got {_shown(dotted, text)}; quote it"
        ) from None


def _unknown_keys(cls: type[BaseModel], tree: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        field = cls.model_fields.get(str(key))
        if field is None:
            near = did_you_mean(str(key), list(cls.model_fields))
            place = prefix.rstrip(".") or "the configuration"
            yield f"{prefix}{key}: must be a key of {place}, got '{key}'{near}"
            continue
        section, entry = _section_type(field.annotation), _entry_type(field.annotation)
        if section is not None and isinstance(value, dict):
            yield from _unknown_keys(section, value, f"{prefix}{key}.")
        elif entry is not None and isinstance(value, dict):
            for name, tree_of_name in value.items():
                if isinstance(tree_of_name, dict):
                    yield from _unknown_keys(entry, tree_of_name, f"{prefix}{key}.{name}.")


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation, also behind `X | None`; None for plain values."""
    if get_origin(annotation) in (dict, list):
        return None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _entry_type(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model that the values of a dict are; None for other annotations."""
    return _section_type(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def _by_key(items: Iterable[Any], tree: Any) -> list[Any]:
    """One mistake a key, also where its value is of none of several types."""
    found: dict[tuple[Any, ...], Any] = {}
    for item in items:
        place = item["loc"] if item["type"] == "missing" else _place_in(tree, item["loc"])
        if place in found:
            also = item["msg"].replace("Input should", "").replace("Input is not", " be")
            found[place]["msg"] += f" or{also}"
        else:
            found[place] = item | {"loc": place}
    return list(found.values())


def _place_in(tree: Any, place: tuple[Any, ...]) -> tuple[Any, ...]:
    """A mistake's place without what pydantic adds to it: which of a union's types it tried."""
    for depth, part in enumerate(place):
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return place[:depth] or place
    return place


def _one_line(item: Any) -> str:
    dotted = ".".join(str(part) for part in item["loc"]) or "configuration"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{dotted}: must be given, got nothing; set it in the YAML or as {dotted}=…"
    if item["type"] == "value_error":
        return message  # our own validators name the key themselves
    message = message[0].lower() + message[1:].replace("Input should", "must")
    message = message.replace("input should", "must")
    return f"{dotted}: {message}, got {_shown(dotted, item['input'])}; see --help"


def _shown(key: str, value: Any) -> str:
    """A value in a message: without what is secret, by its own name or by names in it."""
    return repr(masked_tree({key: value})[key])


def _walk_fields(cls: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for key, field in cls.model_fields.items():
        section, entry = _section_type(field.annotation), _entry_type(field.annotation)
        if section is None:
            yield prefix + key, field
        else:
            yield from _walk_fields(section, f"{prefix}{key}.")
        if entry is not None:
            yield from _walk_fields(entry, f"{prefix}{key}.NAME.")


def _default_text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return str(value) if isinstance(value, Path) else repr(value)


def _type_text(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(str(value) for value in args)
    if origin is Annotated:
        return _type_text(args[0])
    if origin in (Union, UnionType):
        return " | ".join(_type_text(arg) for arg in args)
    if args:
        return f"{origin.__name__}[{', '.join(_type_text(arg) for arg in args)}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
