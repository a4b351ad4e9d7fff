"""Every exported op has its reference, its case, its docstring; and one op's cases run."""

import inspect
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/kernels"


def main() -> int:
    import triptych_kernels as tk

    op = sys.argv[1] if len(sys.argv) > 1 else "swiglu"
    ops = [name.removesuffix("_ref") for name in tk.__all__ if name.endswith("_ref")]
    if op not in ops and f"{op}_" not in ops:
        print(f"op: must be one of {', '.join(ops)}, got {op}")
        return 2
    cases = (TESTS / "op_cases.py").read_text()
    faults = [f"{name}: {fault}" for name in ops for fault in faults_of(tk, name, cases)]
    print("\n".join(faults) or f"{len(ops)} ops with reference, cases and docstring")
    if faults:
        return 1
    return int(pytest.main([str(TESTS / "test_every_op.py"), "-q", "-k", op]))


def faults_of(tk: object, name: str, cases: str) -> list[str]:
    """What is missing of an op; those that work in place end in an underscore."""
    found = []
    function = getattr(tk, f"{name}_", None) or getattr(tk, name, None)
    if function is None:
        return ["is not exported beside its reference"]
    documentation = inspect.getdoc(function) or ""
    if "(" not in documentation:
        found.append("its docstring says no shapes")
    if f"tk.{function.__name__}" not in cases and f"tk.{name}_ref" not in cases:
        found.append("is not in CASES of tests/kernels/op_cases.py")
    # Besides test_every_op.py, which reads CASES and names none.
    if not any(name in path.read_text() for path in TESTS.glob("test_*.py")):
        found.append("is compared with fp64 in no test of tests/kernels")
    return found


if __name__ == "__main__":
    sys.exit(main())
