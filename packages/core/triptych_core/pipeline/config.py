"""What a recipe's YAML says: its arguments and its steps. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from triptych_core.config import load_config
from triptych_core.sections import Section

Kind = Literal["model", "run", "shards", "file", "folder", "scores", "search"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
RESERVED = ("dir",)

# What a stage leaves in its run folder: the name, what it is, and where it stands there.
STAGE_OUTPUTS: dict[str, tuple[Kind, str]] = {
    "run": ("run", "."),
    "export": ("model", "export"),
    "adapter": ("folder", "adapter"),
}


class ArgumentConfig(Section):
    """Something the command line gives: `language=models/Qwen3-8B`."""

    kind: Literal["model", "shards", "file", "folder", "number", "text"] = Field(
        description="a model, shards, a file and a folder are paths, and must exist"
    )
    default: str | int | float | None = Field(None, description="without one it must be given")
    about: str = Field("", description="what it is, for people")


class OutputConfig(Section):
    """Something a command writes below its step's folder."""

    kind: Kind = Field(
        description="model: a Hugging Face directory; shards: of triptych-data; scores: the JSON "
        "of tools/evaluate.py; search: that of tools/search_resolution.py; run, file, folder"
    )
    path: str = Field("", description="below the step's folder; by default the output's name")


class StepConfig(Section):
    """A stage, or a command, and what it starts from: `{step.output}` in its settings or words."""

    about: str = Field("", description="what it is for, for people")
    stage: str | None = Field(None, description="the stage's script")
    config: str | None = Field(None, description="its YAML")
    set: dict[str, Any] = Field(default_factory=dict, description="keys that differ from the YAML")
    run: list[str | int | float] = Field(
        default_factory=list, description="words of a command instead: a script, or a program"
    )
    makes: dict[Name, OutputConfig] = Field(
        default_factory=dict, description="what the command writes, by name"
    )
    ranks: int | str | None = Field(
        None, description="processes; by default all GPUs, or one on a CPU; of a command, one"
    )

    @property
    def outputs(self) -> dict[str, tuple[Kind, str]]:
        """Kind and place below the step's folder of all it can leave."""
        if self.stage:
            return STAGE_OUTPUTS
        return {name: (output.kind, output.path or name) for name, output in self.makes.items()}


class RecipeConfig(Section):
    """The steps in the order in which they run."""

    about: str = Field("", description="what is trained, and after whom")
    launcher: list[str] = Field(
        default_factory=list,
        description="what starts a stage, by default DeepSpeed's launcher on this machine: "
        "[deepspeed, --hostfile, hosts]; {ranks} is the number of processes",
    )
    arguments: dict[Name, ArgumentConfig] = Field(
        default_factory=dict, description="what the command line gives"
    )
    steps: dict[Name, StepConfig] = Field(min_length=1, description="in the order they run")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        for name in (*self.arguments, *self.steps):
            if name in RESERVED or (name in self.arguments and name in self.steps):
                got = "a reserved word" if name in RESERVED else "an argument and a step"
                raise ValueError(f"{name}: must be a name of its own, got {got}; rename it")
        for name, step in self.steps.items():
            _check_step(f"steps.{name}", step)
        return self


def read_recipe(path: Path) -> RecipeConfig:
    """Read a recipe's YAML.

    Raises:
        ValueError: one line per mistake, each `<dotted path>: <what must hold>, got <value>; …`.
    """
    if not path.is_file():
        raise ValueError(f"RECIPE: must be an existing YAML file, got '{path}'; check the path")
    _refuse_repeated_steps(path)
    return load_config(RecipeConfig, path)


def _check_step(where: str, step: StepConfig) -> None:
    """A stage has settings and known outputs, a command has words and says what it makes."""
    if bool(step.stage) == bool(step.run):
        got = "both" if step.stage else "neither"
        raise ValueError(f"{where}.stage: must be given, or run instead, got {got}; give one")
    if step.stage and step.makes:
        raise ValueError(
            f"{where}.makes: must be left out for a stage, whose outputs are "
            f"{', '.join(STAGE_OUTPUTS)}, got {', '.join(step.makes)}; drop it"
        )
    if step.run and (step.config or step.set):
        key = "config" if step.config else "set"
        raise ValueError(f"{where}.{key}: must go with a stage, got a command; give it words")
    if isinstance(step.ranks, int) and step.ranks < 1:
        raise ValueError(f"{where}.ranks: must be at least 1, got {step.ranks}; ask for more")


def _refuse_repeated_steps(path: Path) -> None:
    """YAML keeps the last of equal keys without a word: a step would be gone."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # said better by the reader
    if not isinstance(root, yaml.MappingNode):
        return
    for key, node in root.value:
        names = [k.value for k, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{key.value}.{name}: must stand once, got it twice; rename one")
