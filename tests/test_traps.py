"""Every trap that is listed has a test that is there, and every mutation a place in the code."""

from __future__ import annotations

import ast
import tomllib

import pytest

from tests.mutations import MUTATIONS, ROOT, changed

TRAPS = tomllib.loads((ROOT / "tests/traps.toml").read_text())


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_guarded(name):
    trap = TRAPS[name]
    assert trap["what"] and trap.keys() <= {"what", "tests", "mutations", "open"}
    assert trap["tests"] or trap.get("open"), "must have a test, or say why there is none"
    for node in trap["tests"]:
        path, _, function = node.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        functions = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
        assert not function or function in functions, node
    for mutation in trap.get("mutations", ()):
        guards = [node.partition("::")[0] for node in trap["tests"]]
        assert MUTATIONS[mutation].words[0].partition("::")[0] in guards, mutation


def test_every_mutation_belongs_to_a_trap_and_has_a_place():
    assert {m for trap in TRAPS.values() for m in trap.get("mutations", ())} == MUTATIONS.keys()
    for mutation in MUTATIONS.values():
        text = (ROOT / "packages" / mutation.file).read_text()
        assert changed(mutation, text) != text
