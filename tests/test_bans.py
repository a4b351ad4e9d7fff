"""What runs code or a shell that a file could choose is written nowhere: read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PICKLES = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
CALLS = {
    *(f"{module}.{name}" for module in PICKLES for name in ("load", "loads", "open", "Unpickler")),
    "pandas.read_pickle",
    *(f"yaml.{loader}{all_}" for loader in ("load", "full_load") for all_ in ("", "_all")),
    *("yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("eval", "exec", "builtins.eval", "builtins.exec"),
    "shutil.unpack_archive",
}
# Of whatever object; the last is DeepSpeed's, which unpickles.
METHODS = {"extractall", "load_checkpoint"}
KEYWORDS = {"weights_only": False, "allow_pickle": True, "shell": True, "trust_remote_code": True}
# Whose bytes these are is why they may stay.
ALLOWED = {
    (
        "packages/data/triptych_data/workers/transport.py",
        "pickle.loads",
    ): "our child",
    ("tools/bench_data_read.py", "pickle.loads"): "our own copy",
}
SOURCES = sorted(
    path for folder in ("packages", "stages", "tools") for path in (ROOT / folder).rglob("*.py")
)


def banned(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every call that is banned, whatever the names it was imported by."""
    tree = ast.parse(source)
    names = _imported(tree)
    unpacks = "tarfile" in source or "zipfile" in source
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func, names)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if called in CALLS or method in METHODS:
            yield node.lineno, called
        if method == "extract" and unpacks:
            yield node.lineno, called
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for name, value in KEYWORDS.items():
            found = given.get(name)
            if isinstance(found, ast.Constant) and bool(found.value) is value:
                yield node.lineno, f"{called}({name}={found.value})"
        if called == "torch.load" and "weights_only" not in given:
            yield node.lineno, "torch.load without weights_only=True"


def _imported(tree: ast.AST) -> dict[str, str]:
    """What each name of a module means, dotted."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "…"


def test_nothing_that_a_file_could_run_is_called():
    assert len(SOURCES) > 200
    found = {}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        for line, call in banned(path.read_text()):
            if (name, call) not in ALLOWED:
                found[f"{name}:{line}"] = call
    assert found == {}


def test_what_is_allowed_is_there():
    for name, call in ALLOWED:
        assert call in [found for _, found in banned((ROOT / name).read_text())]


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch as t; t.load(path)",
        "from torch import load; load(path)",
        "torch.load(path, weights_only=None)",
        "import pickle; pickle.load(file)",
        "import pickle as p; p.loads(data)",
        "from pickle import Unpickler as U; U(file)",
        "import joblib; joblib.load(path)",
        "import numpy; numpy.load(path, allow_pickle=True)",
        "import pandas as pd; pd.read_pickle(path)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load; unsafe_load(text)",
        "import subprocess; subprocess.run(command, shell=True)",
        "import os; os.system(command)",
        "eval(text)",
        "def f():\n    exec(text)",
        "import builtins; builtins.exec(text)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "import tarfile; tarfile.open(path).extractall(folder)",
        "import tarfile\nwith tarfile.open(path) as tar: tar.extract(member)",
        "import shutil; shutil.unpack_archive(path)",
        "engine.load_checkpoint(path)",
    ],
)
def test_each_of_them_is_found(line):
    assert list(banned(line))


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path, weights_only=True)",
        "model.eval()",
        "import yaml; yaml.safe_load(text)",
        "import subprocess; subprocess.run(command, shell=False)",
        "AutoConfig.from_pretrained(path, trust_remote_code=False)",
        "import pickle; pickle.dumps(value)",
        "from triptych_core.checkpoint.load import load_checkpoint; load_checkpoint(engine)",
        "import numpy; numpy.load(path, mmap_mode='r')",
    ],
)
def test_what_is_harmless_is_not(line):
    assert not list(banned(line))
