"""Import arrows that import-linter cannot see: stages and tools are scripts, not packages."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = {"triptych_core", "triptych_data", "triptych_models", "triptych_kernels"}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


def test_stages_import_core_data_and_models_and_never_each_other():
    # What they share is no stage.
    shared = {"planning", "wiring", "running", "verifying", "rehearsing"}
    shared |= {"replaying", "replaying_rows", "replaying_samples"}
    stages = {path.stem for path in (ROOT / "stages").glob("*.py")} - shared
    assert stages
    for path in (ROOT / "stages").glob("*.py"):
        assert imported(path) & OURS <= {"triptych_core", "triptych_data", "triptych_models"}
        assert not imported(path) & (stages - {path.stem}), path


def test_no_stage_hides_a_module_of_the_standard_library():
    # `deepspeed stages/sft.py` puts stages/ first on sys.path.
    stages = {path.stem for path in (ROOT / "stages").glob("*.py")}
    assert not stages & set(sys.stdlib_module_names)


def test_kernels_import_only_torch_and_themselves():
    known = {"torch", "triton", "flash_attn", "fla", "transformers", "triptych_kernels"} | set(
        sys.stdlib_module_names
    )
    for path in (ROOT / "packages/kernels").rglob("*.py"):
        assert imported(path) <= known, path


def test_gitignore_hides_no_package():
    for line in (ROOT / ".gitignore").read_text().splitlines():
        name = line.strip().strip("/")
        if name in {"data", "models", "core", "kernels"}:
            assert line.startswith("/"), line


def test_versions_agree():
    version = (ROOT / "VERSION").read_text().strip()
    assert f'"triptych-kernels=={version}"' in (ROOT / "packages/models/pyproject.toml").read_text()
