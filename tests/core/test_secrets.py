"""Secrets go through every door and are nowhere in what is written or said."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from tests.data.webserver import serving
from tests.ranks import run_ranks
from tests.tiny import ROOT, make_model_dir, make_shards, sft_stage
from triptych_core.config import StageConfig, dump_config, load_config, render_help
from triptych_core.secrets import is_secret_name, masked, masked_tree, masked_words
from triptych_data.cli.main import main as triptych_data
from triptych_data.storage import secrets as data_secrets

PLANTED = {"HF_TOKEN": "hf_PLANTED_one", "MY_STORE_PASSWORD": "PLANTED/+two"}
URL = "http://robot:PLANTED_three@{host}/{name}?sig=PLANTED_four&x=PLANTED_five"


def planted_in(*folders: Path) -> list[str]:
    """The files below that hold a secret, with what stands around it."""
    found = []
    for path in sorted(each for folder in folders for each in folder.rglob("*") if each.is_file()):
        data = path.read_bytes()
        if (at := data.find(b"PLANTED")) >= 0:
            found.append(f"{path}: {data[max(0, at - 60) : at + 40]!r}")
    return found


def door(*words: str, cwd: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    paths = [ROOT, *(ROOT / "packages" / name for name in ("core", "data", "models", "kernels"))]
    places = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "XDG_CACHE_HOME": str(cache)}
    environment = os.environ | PLANTED | places | {"DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize(
    "name",
    [
        *(
            "HF_TOKEN",
            "WANDB_API_KEY",
            "AWS_ACCESS_KEY_ID",
            "apiKey",
            "--password",
            "storage.secret",
        ),
        *(
            "AZURE_STORAGE_CONNECTION_STRING",
            "DBPASSWORD",
            "x-sas",
            "GOOGLE_CREDENTIALS",
            "myapikey",
        ),
    ],
)
def test_names_of_secrets(name):
    assert is_secret_name(name) and data_secrets.is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "max_new_tokens", "sample_keys", "tiktoken", "monkey"]
)
def test_names_of_no_secrets(name):
    assert not is_secret_name(name) and not data_secrets.is_secret_name(name)


@pytest.mark.parametrize("stage", ["align", "pretrain", "sft", "diffusion", "rae"])
def test_no_setting_of_a_stage_is_taken_for_one(stage):
    """Else a run's own config.yaml would not be read again."""
    sft_stage()
    kind = getattr(importlib.import_module(stage), f"{stage.capitalize()}Config")
    names = re.findall(r"^ *([\w.]+): (?!int)", render_help(kind), flags=re.MULTILINE)
    assert len(names) > 50 and not [name for name in names if is_secret_name(name)]


def test_text(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "short")
    monkeypatch.setenv("B_TOKEN", "long enough")
    monkeypatch.setenv("C_KEY", str(ROOT))  # the path of a file is none
    text = f"{ROOT} short long enough s3://u:p@ss@h/a.tar?X=1&Y=2 'https://h/b.tar?c' c?d"
    assert masked(text) == f"{ROOT} short *** s3://***@h/a.tar?*** 'https://h/b.tar?***' c?d"


def test_trees_and_words():
    tree = {"api_key": "x", "pad_token_id": 7, "a": [{"password": "x"}, "h://u@h"], "token": None}
    assert masked_tree(tree) == {
        "api_key": "***",
        "pad_token_id": 7,
        "a": [{"password": "***"}, "h://***@h"],
        "token": None,
    }
    words = ["x.py", "--token", "x", "--api-key=x", "a.secret=x", "--tokens", "7"]
    assert masked_words(words) == [
        *("x.py", "--token", "***", "--api-key=***", "a.secret=***", "--tokens", "7")
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["log.wandb_project.password='PLANTED"],  # no YAML
        ["run={password: PLANTED}", "run.password.x=1"],
        ["run=[{api_key: PLANTED}]"],
        ["run.steps=http://u:PLANTED@h/x?PLANTED"],
    ],
)
def test_a_mistake_in_a_configuration_is_told_without_secrets(words):
    with pytest.raises(ValueError) as caught:
        load_config(StageConfig, None, words)
    assert "PLANTED" not in masked(str(caught.value))


def test_a_file_that_is_no_yaml_is_told_by_its_place(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: 1\nb: {token: PLANTED, c: [}\n")
    with pytest.raises(ValueError, match=r"bad\.yaml: must be YAML, got .* in line 2, column 25$"):
        load_config(StageConfig, path)


def test_the_resolved_tree_has_none(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_PLANTED")
    config = load_config(StageConfig, None, ["log.wandb_project=x-hf_PLANTED"])
    assert yaml.safe_load(dump_config(config))["log"]["wandb_project"] == "x-***"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("secrets")
    make_model_dir(path / "model")
    make_shards(path / "train", 14, seed=1)
    return path


def words_of(url: str, *more: str) -> list[str]:
    return [
        "run.dir=run",
        "run.device=cpu",
        "model.path=model",
        "model.init=random",
        f"data.shards=['{url}']",
        "data.seq_len=256",
        "data.num_workers=0",
        "data.ledger=true",
        "export=false",
        f"log.wandb_project={PLANTED['HF_TOKEN']}",
        *more,
    ]


def go_on(place: Path, words: list[str]) -> None:
    os.chdir(place)
    os.environ |= PLANTED | {"XDG_CACHE_HOME": str(place / "cache")}
    sys.argv[1:] = words
    sft = sft_stage()
    sft.main(load_config(sft.SftConfig, None, words))


def test_a_stage_and_its_resume(place):
    """Shards by a URL with a password; what it says, its run folder and its caches have none."""
    with serving(place / "train/shards") as server:
        url = URL.format(host=server.url.partition("://")[2], name="shard-{000000..000001}.tar")
        stage = [str(ROOT / "stages/sft.py"), *words_of(url, "run.steps=1")]
        first = door(*stage, cwd=place, cache=place / "cache")
        assert first.returncode == 0, first.stderr
        assert "PLANTED" not in first.stdout + first.stderr
        assert "***@127.0.0.1" in json.loads((place / "run/run.json").read_text())["command"]
        run_ranks(go_on, 1, place, words_of(url.replace("robot", "other"), "run.steps=2"))
    assert planted_in(place) == []
    facts = json.loads((place / "run/run.json").read_text())
    assert set(facts["resumes"][0]["changed"]) == {"run.steps"}  # not the user
    saved = json.loads((place / "run/checkpoints/step-000002/state.json").read_text())
    assert saved["config"]["log"]["wandb_project"] == "***"


def test_a_traceback(tmp_path):
    code = (
        "import os, threading\n"
        "from triptych_core.secrets import mask_tracebacks\n"
        "def fail(): raise KeyError(f'no {os.environ[\"HF_TOKEN\"]}')\n"
        "mask_tracebacks()\n"
        "thread = threading.Thread(target=fail)\n"
        "thread.start(); thread.join(); fail()\n"
    )
    done = door("-c", code, cwd=tmp_path, cache=tmp_path)
    assert done.stderr.count("KeyError: 'no ***'") == 2 and "PLANTED" not in done.stderr


def test_a_recipe(tmp_path):
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')"
    (tmp_path / "say.py").write_text(script)
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "try.yaml").write_text(
        "arguments: {from: {kind: text}}\n"
        "steps:\n"
        '  one: {run: [say.py, "{dir}/out", --token, PLANTED, "{from}"], '
        "makes: {out: {kind: file}}}\n"
        '  two: {run: [bad.py, "{one.out}", "api_key=PLANTED"], makes: {out: {kind: file}}}\n'
    )
    (tmp_path / "try.yaml").rename(tmp_path / "recipe.yaml")
    words = ["-m", "triptych_core.pipeline.command", "run", "recipe.yaml", "--dir", "done"]
    url = URL.format(host="h", name="a.tar")
    told = [
        door(*words, f"from={url}", cwd=tmp_path, cache=tmp_path),
        door(*words, f"from={url}", cwd=tmp_path, cache=tmp_path),
        door(*words, f"from={url.replace('h/', 'i/')}", cwd=tmp_path, cache=tmp_path),
    ]
    assert [each.returncode for each in told] == [1, 1, 2]
    assert "one: done" in told[1].stderr and "one: run must be that of" in told[2].stderr
    assert not [each for each in told if "PLANTED" in each.stdout + each.stderr]
    assert planted_in(tmp_path / "done") == []


def test_commands_on_data(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    with serving(place / "train/shards") as server:
        host = server.url.partition("://")[2]
        for command, name, *more in (
            ("inspect", "shard-000000.tar", "--model", "model"),
            ("verify", "shard-000001.tar"),
            ("verify", "none.tar"),
            ("index", "shard-000000.tar"),
            ("reshard", "shard-000000.tar", "other"),
            ("inspect", "list", "--model", "model"),
        ):
            words = [command, URL.format(host=host, name=name), *more]
            result = CliRunner().invoke(triptych_data, words)
            assert isinstance(result.exception, SystemExit | None), result.exception
            assert "PLANTED" not in result.output, result.output
    assert (place / "other").exists() and planted_in(place) == []


class Telling(MemoryFileSystem):
    """A store whose errors quote what it was asked with."""

    protocol = "telling"
    kind = PermissionError

    def info(self, path: str, **_: Any) -> Any:
        raise self.kind(f"403 for Authorization: Bearer {os.environ['HF_TOKEN']}")


@pytest.mark.parametrize("kind", [PermissionError, ValueError, OSError])
def test_what_a_store_answers(kind, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    monkeypatch.setattr(Telling, "kind", kind)
    monkeypatch.setattr("triptych_data.storage.remote.time.sleep", lambda _: None)  # 5 attempts
    register_implementation("telling", Telling, clobber=True)
    result = CliRunner().invoke(triptych_data, ["verify", "telling://bucket/x.tar"])
    assert result.exit_code == 1 and "Bearer ***" in result.output, result.output
    assert "PLANTED" not in result.output


def test_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    result = CliRunner().invoke(triptych_data, ["verify", str(tmp_path / PLANTED["HF_TOKEN"])])
    assert result.exit_code != 0 and "***" in result.output and "PLANTED" not in result.output
