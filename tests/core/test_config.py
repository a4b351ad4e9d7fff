"""Configuration: defaults, overrides, and mistakes that must never reach a GPU."""

import os
import subprocess
import sys
from typing import Annotated

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from triptych_core.config import StageConfig, dump_config, load_config, parse_args, render_help
from triptych_core.strict_yaml import load_yaml


def load(*overrides: str) -> StageConfig:
    return load_config(StageConfig, None, overrides)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 0.5, weight_decay: 0.3}\nrun: {steps: 7}\n")
    config = load_config(StageConfig, path, ["optim.lr=1e-5"])
    assert config.optim.lr == 1e-5  # YAML alone reads 1e-5 as a string
    assert config.optim.weight_decay == 0.3
    assert config.run.steps == 7
    assert config.optim.beta1 == 0.9


def test_dump_and_load_are_inverse(tmp_path):
    config = load("optim.lr_by_part={vision: 1e-6}", "schedule.kind=wsd", "run.steps=50")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(StageConfig, path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.ler=1", "optim.ler: must be a key of optim, got 'ler'; did you mean 'lr'?"),
        ("optmi.lr=1", "did you mean 'optim'?"),
        ("optim.lr=fast", "optim.lr: must be a valid number"),
        ("run.steps=0", "run.steps: must be greater than or equal to 1, got 0"),
        ("engine.zero.stage=4", "engine.zero.stage: must be 0, 1, 2, 3 or 'auto', got 4"),
        ("optim.lr.x=1", "optim.lr"),
        ("engine.zero=3", "engine.zero"),
        ("schedule.warmup_steps=2000", "warmup_steps + decay_steps must be at most run.steps"),
    ],
)
def test_a_wrong_override_is_refused_by_its_dotted_path(override, message):
    with pytest.raises(ValueError, match=r"must|mean") as caught:
        load(override)
    assert message in str(caught.value)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ValueError, match="ler") as caught:
        load("optim.ler=1", "run.stepz=2")
    assert len(str(caught.value).splitlines()) == 2


def test_a_value_of_no_type_of_its_key_is_one_mistake():
    with pytest.raises(ValueError, match=r"^run\.hang_seconds: must be 'auto' or be a valid num"):
        load("run.hang_seconds=soon")


def test_combinations_deepspeed_would_compute_wrongly_are_refused():
    with pytest.raises(ValueError, match=r"engine\.zero\.offload_params"):
        load("engine.zero.stage=2", "engine.zero.offload_params=true")
    load("engine.zero.stage=0", "engine.gradient_accumulation_steps=2")


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: [")
    with pytest.raises(ValueError, match=r"run\.yaml: must be YAML"):
        load_config(StageConfig, path)
    with pytest.raises(ValueError, match="must be an existing YAML file"):
        load_config(StageConfig, tmp_path / "absent.yaml")


def test_the_launchers_local_rank_is_accepted():
    config = parse_args(StageConfig, ["--local_rank=1", "optim.lr=0.1", "--local_rank", "0"])
    assert config.optim.lr == 0.1


def test_help_names_every_key_with_its_default():
    text = render_help(StageConfig)
    assert "optim.lr: float = 0.0001" in text
    assert "engine.zero.stage: 0|1|2|3|auto = 'auto'" in text


def test_nobody_need_read_the_help():
    """As of `--help | head`, which has seen enough."""
    code = (
        "from triptych_core.config import StageConfig as C, parse_args; parse_args(C, ['--help'])"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    share: Annotated[float, Field(ge=0)] | None = Field(None, description="of the whole")


class Mixed(StageConfig):
    parts: dict[str, Part] = Field(default_factory=dict)


def test_sections_may_be_named_by_the_user():
    config = load_config(Mixed, None, ["parts.first.share=2", "parts.other={share: 1}"])
    assert {name: part.share for name, part in config.parts.items()} == {"first": 2.0, "other": 1.0}
    with pytest.raises(ValueError, match=r"parts\.first\.shar: .* did you mean 'share'\?"):
        load_config(Mixed, None, ["parts.first.shar=2"])
    text = render_help(Mixed)
    assert "parts: dict[str, Part] = {}" in text
    assert "parts.NAME.share: float | None = None" in text


def test_mistakes_exit_with_two_and_print_config_prints(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(StageConfig, ["optim.ler=1"])
    assert caught.value.code == 2
    assert "error: optim.ler" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        parse_args(StageConfig, ["--print-config", "optim.lr=0.25"])
    assert caught.value.code == 0
    assert "lr: 0.25" in capsys.readouterr().out


def test_config_does_not_import_torch():
    code = "import sys, triptych_core.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: 1e-5\nb: 0x1f\nc: on\nd: ~", {"a": "1e-5", "b": 31, "c": True, "d": None}),
        ("", None),
    ],
)
def test_plain_yaml_is_read_as_ever(text, wanted):
    found = load_yaml(text)
    assert found == yaml.safe_load(text)
    assert wanted is None or wanted.items() <= found.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "the key 'c' twice in line 2, column 11"),
        ("a: &a [*a]", "a value that holds itself in line 1"),
        ("a: " + "[" * 60 + "]" * 60, "more than 50 values within each other"),
        ("a: " + "7" * 41, "a value of more than 40 characters"),
    ],
)
def test_yaml_that_is_not_plain_is_refused_by_its_place(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"a.yaml: must be YAML, got {message}"):
        load_config(StageConfig, path)
