"""The table of mutations fits the sources; ``python -m tests.mutations`` runs it."""

from __future__ import annotations

import ast

import pytest

from .mutations import MUTATIONS, PACKAGE, TESTS, selected, verdict

every_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)


def functions_of(path):
    """The node ids of a file's functions, without their parameters."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return found


@every_mutation
def test_the_old_text_is_there_once(mutation):
    """A mutation changes its module in one place, and makes another program of it."""
    source = (PACKAGE / mutation.module).read_text()
    mutated = mutation.mutate(source)
    compile(mutated, mutation.module, "exec")
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))


@every_mutation
def test_the_test_is_there(mutation):
    """The test that a mutation names exists; its parameters are seen when it runs."""
    file, _, name = mutation.test.partition("::")
    assert name.split("[")[0] in functions_of(TESTS / file)


def test_every_invariant_has_a_mutation():
    """I1 to I12, the limits, the rights, the drain and the fast paths: none is upheld by hope."""
    groups = {f"I{n}" for n in range(1, 13)} | {"limits", "rights", "drain", "fast"}
    assert {mutation.invariant for mutation in MUTATIONS} == groups


def test_names_are_unique_and_select():
    """A mutation is found by its name or its invariant; an unknown name is an error."""
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    assert [mutation.name for mutation in selected(names[:1])] == names[:1]
    assert {mutation.invariant for mutation in selected(["I4"])} == {"I4"}
    with pytest.raises(SystemExit, match="No such mutation: nonsense"):
        selected(["nonsense"])


@pytest.mark.parametrize(
    ("code", "expected"),
    [(0, "SURVIVED"), (1, "red"), (2, "ERROR"), (4, "ERROR"), (5, "ERROR"), (None, "ERROR")],
)
def test_only_a_failed_test_is_red(code, expected):
    """A collection error, no test at all or a run without an end does not count."""
    assert verdict(code) == expected
