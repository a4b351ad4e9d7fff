"""Which code a run is of: versions, and the sources of Triptych, whatever their version says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("triptych_core", "triptych_data", "triptych_kernels", "triptych_models")


@cache
def code_fingerprint() -> str:
    """SHA-256 of the names and contents of all Python files of the packages that are installed."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Of those installed: sources that are only on the path have none."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
