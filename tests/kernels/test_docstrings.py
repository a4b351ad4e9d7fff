"""What a docstring of an op says: shapes and errors; and its file: the formula and its source."""

import inspect
import re
import sys

import pytest

from triptych_kernels import functional


@pytest.mark.parametrize("name", functional.__all__)
def test_shapes_and_errors(name):
    op = getattr(functional, name)
    doc = inspect.getdoc(op)
    assert re.search(r"\([A-Z.][\w., /*+]*\)|of one shape", doc), "shapes"
    assert "eturns" in doc or "->" in doc, "what it gives"
    body = inspect.getsource(sys.modules[op.__module__])
    if "raise ValueError" in body and name not in ("balance_loss", "z_loss", "expert_counts"):
        assert "ValueError" in doc, "errors"


@pytest.mark.parametrize("name", functional.__all__)
def test_formula_and_source(name):
    module = sys.modules[getattr(functional, name).__module__]
    text = inspect.getsource(module)
    assert re.search(r"[=*/+]|softmax", module.__doc__), "a formula"
    assert re.search(r"arXiv|\d{4}\.\d{5}|github\.io|Keller Jordan|formula of the norm", text), (
        "where it comes from"
    )
