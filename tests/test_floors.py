"""No dependency may have a known hole: docs/advisories.toml against all that asks for one."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
ADVISORIES = tomllib.loads((ROOT / "docs/advisories.toml").read_text())["floor"]
FLOORS = {each["package"]: Version(each["version"]) for each in ADVISORIES}
# What the machine with GPUs has (BENCHMARKS.md).
GPU_MACHINE = {"torch": "2.11.0", "transformers": "5.17.0"}


def requirements() -> list[tuple[str, Requirement]]:
    """Every requirement of the packages and of the files that pip reads, with the file."""
    found = []
    for path in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(path.read_text())["project"]
        extras = project.get("optional-dependencies", {}).values()
        for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
            found.append((str(path.relative_to(ROOT)), Requirement(text)))
    for path in (ROOT / "constraints.txt", ROOT / "requirements-dev.txt"):
        for line in path.read_text().splitlines():
            if re.match(r"[A-Za-z]", line):
                found.append((path.name, Requirement(line)))
    return found


def lowest(requirement: Requirement) -> Version | None:
    """The lowest version that it takes, by its >= or ==."""
    bounds = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==", "~=")]
    return max(bounds, default=None)


def too_low(found: list[tuple[str, Requirement]]) -> list[str]:
    """Requirements that would take a version below its floor."""
    return [
        f"{file}: {requirement}: must be >= {floor}"
        for file, requirement in found
        if (floor := FLOORS.get(canonicalize_name(requirement.name))) is not None
        and ((bound := lowest(requirement)) is None or bound < floor)
    ]


def test_no_requirement_takes_a_version_below_its_floor():
    found = requirements()
    named = {canonicalize_name(requirement.name) for _, requirement in found}
    assert named >= FLOORS.keys(), "a floor for what nothing requires"
    assert too_low(found) == []


def test_what_is_installed_is_not_below_its_floor():
    low = {}
    for name, floor in FLOORS.items():
        try:
            if Version(version(name)) < floor:
                low[name] = version(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed
    assert low == {}


def test_floors_leave_the_gpu_machine_usable():
    assert all(Version(has) >= FLOORS[name] for name, has in GPU_MACHINE.items())


def test_every_floor_says_why():
    for each in ADVISORIES:
        assert each["ids"] and all(re.fullmatch(r"(CVE|GHSA)-[\w-]+", name) for name in each["ids"])
        assert each["source"] in ("primary", "secondary") and each["what"] and each["reached"]


@pytest.mark.parametrize("text", ["torch>=2.9", "torch", "Pillow==12.3.0", "urllib3~=2.6.2"])
def test_a_requirement_that_is_too_low_is_found(text):
    assert too_low([("constraints.txt", Requirement(text))])
