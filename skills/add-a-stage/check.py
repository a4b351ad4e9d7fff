"""What every stage must have; exits with 1 and says what is missing."""

import ast
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
STAGES = ROOT / "stages"
SHARED = {"triptych_core", "triptych_data", "triptych_models", "triptych_kernels"}


def main() -> int:
    scripts = sorted(p for p in STAGES.glob("*.py") if 'if __name__ == "__main__"' in p.read_text())
    wanted = sys.argv[1:]
    if unknown := set(wanted) - {path.stem for path in scripts}:
        print(f"stage: must be one of {', '.join(p.stem for p in scripts)}, got {unknown}")
        return 2
    chosen = [path for path in scripts if not wanted or path.stem in wanted]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(faults, chosen))
    for path, missing in zip(chosen, found, strict=True):
        print(f"{path.name}: {'; '.join(missing) or 'as a stage should be'}")
    return int(any(found) or not chosen)


def faults(path: Path) -> list[str]:
    missing = []
    if path.stem in sys.stdlib_module_names:
        missing.append("has the name of a module of the standard library")
    if strange := sorted(imported(path) - SHARED - {p.stem for p in STAGES.glob("*.py")}):
        missing.append(f"imports {', '.join(strange)}")
    if ast.get_docstring(ast.parse(path.read_text())) is None:
        missing.append("has no docstring, which its --help would show")
    configs = sorted((STAGES / "configs").glob(f"{path.stem}_*.yaml"))
    if not any("tiny" in config.name for config in configs):
        missing.append(f"has no stages/configs/{path.stem}_*tiny.yaml")
    shown, refused, *printed = calls(
        path,
        ["--help"],
        ["optim.lrr=1"],
        *(["--config", str(config), "--print-config"] for config in configs),
    )
    if shown.code or f"stages/{path.name}" not in shown.out:
        missing.append("its --help fails or shows no command of it")
    if refused.code != 2 or "optim.lr" not in refused.err:
        missing.append("does not refuse optim.lrr by name")
    for config, answer in zip(configs, printed, strict=True):
        if answer.code:
            missing.append(f"refuses {config.name}: {answer.err.strip()}")
    return missing


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports beyond the standard library."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    tops = {name.partition(".")[0] for name in names} - {"torch", "numpy", "pydantic"}
    return tops - sys.stdlib_module_names


class Answer(NamedTuple):
    code: int
    out: str
    err: str


# One process for all command lines of a script: most of a short call's time goes to imports.
CALLS = """
import contextlib, io, json, runpy, sys
path, lines = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = path.rpartition("/")[0]
for words in lines:
    code, out, err = 0, io.StringIO(), io.StringIO()
    sys.argv = [path, *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def calls(path: Path, *lines: list[str]) -> list[Answer]:
    """What a script answers to each of these command lines."""
    command = [sys.executable, "-c", CALLS, str(path), json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{path}: {done.stderr}")
    return [Answer(*json.loads(line)) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
