"""What the README says is there is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path
    for pattern in ("*.md", "packages/*/*.md", "stages/*.md")
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_commands_exist(path):
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.S):
        for name in re.findall(r"(?<!/)\b((?:tools|tests|stages)/[\w/]+\.(?:py|yaml))", block):
            assert (ROOT / name).exists(), name


def test_the_tree_names_every_tool_and_package():
    readme = (ROOT / "README.md").read_text()
    for path in [*(ROOT / "tools").glob("*.py"), *(ROOT / "stages").glob("*.py")]:
        assert path.name in readme, path.name
    for path in (ROOT / "packages").iterdir():
        assert f"packages/{path.name}/" in readme


def test_the_families_are_those_of_the_catalogue():
    """Written by python -m triptych_models --table."""
    from triptych_models.__main__ import table

    readme = (ROOT / "README.md").read_text()
    written = re.search(r"<!-- families: .*? -->\n(.*?)<!-- /families -->", readme, flags=re.S)
    assert written and written[1] == table()


def test_make_targets_named_in_the_readme_exist():
    makefile, readme = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
    for target in set(re.findall(r"(?:^|`)make (\w+)", readme, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_every_key_the_readme_overrides_is_a_key():
    sys.path.insert(0, str(ROOT / "stages"))
    import diffusion
    import rae
    import sft

    from triptych_core.config import load_config

    def is_key(config, key):
        try:
            load_config(config, None, [f"{key}=x"])
        except ValueError as error:
            return "must be a key of" not in str(error)
        return True

    text = (ROOT / "README.md").read_text() + (ROOT / "BENCHMARKS.md").read_text()
    keys = set(re.findall(r"\s((?:model|data|engine|optim|evaluation|run)\.[a-z_.]+)=", text))
    assert keys
    stages = sft.SftConfig, diffusion.DiffusionConfig, rae.RaeConfig
    for key in keys:
        assert any(is_key(stage, key) for stage in stages), key


def test_help_runs_without_a_launcher():
    result = subprocess.run(
        [sys.executable, "stages/sft.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "optim.lr: float" in result.stdout


def test_the_tables_of_combinations_are_those_of_the_tests():
    from tests.stages.combinations import markdown

    text = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- combinations -->\n(.*)\n<!-- /combinations -->", text, flags=re.S)
    assert found, "README.md has no place for them"
    wanted = markdown()
    assert found[1] == wanted, "paste what `python -m tests.stages.combinations` prints"
