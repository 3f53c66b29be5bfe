"""docs/troubleshooting.md explains the reason codes that the code gives, no more and no less."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import safelora_vllm
from safelora_vllm.adapters import canonical, config
from safelora_vllm.gate.reason_codes import REFUSED
from tests.corpus import CORPUS, NAME, TAKEN

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
PACKAGE = Path(safelora_vllm.__file__).parent
HEADING = "## Reason codes"
ROW = re.compile(r"^\| `([a-z_]+)` \| ([^|]+) \| ([^|]+) \|$", re.M)
# Codes that are chosen from a table or by a function, not written where the reason is made:
# file and expression there → all that it may be.
CHOSEN: dict[tuple[str, str], set[str]] = {
    ("adapters/canonical.py", "code"): {*canonical._FEATURES.values(), "unknown_tensor"},
    ("adapters/canonical.py", "flaw"): {"non_finite", "subnormal"},
    ("adapters/config.py", "code"): {*config._UNSUPPORTED.values()},
    ("errors.py", "code"): set(),  # of the faults, which `by_cause` puts together
}


def explained() -> list[tuple[str, str, str]]:
    """Code, cause and cure of each row of the section's tables."""
    _, heading, rest = PAGE.read_text().partition(f"{HEADING}\n")
    assert heading
    return ROW.findall(rest.partition("\n## ")[0])


def calls(tree: ast.AST, names: tuple[str, ...] = ()) -> Iterator[tuple[ast.Call, tuple[str, ...]]]:
    """Every call, with the parameters of the functions around it."""
    for node in ast.iter_child_nodes(tree):
        inner = names
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (*names, *(argument.arg for argument in node.args.args))
        if isinstance(node, ast.Call):
            yield node, inner
        yield from calls(node, inner)


def makers(trees: list[ast.AST]) -> set[str]:
    """`Reason`, `Fault`, and the functions that give them their own first parameter as its code."""
    found = {"Reason", "Fault"}
    while True:
        passing = {
            function.name
            for tree in trees
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.args.args
            for call in ast.walk(function)
            if isinstance(call, ast.Call) and called(call) in found
            if (code := first(call)) and ast.unparse(code) == function.args.args[0].arg
        }
        if passing <= found:
            return found
        found |= passing


def called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def first(call: ast.Call) -> ast.expr | None:
    """The argument that is the code."""
    named = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    return next(iter([*call.args, *named]), None)


def given(within: tuple[str, ...] = ("",)) -> tuple[set[str], set[tuple[str, str]]]:
    """The codes that are written where a reason is made, and the places where they are chosen.

    within: beginnings of the files' names.
    """
    files = {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}
    names = makers(list(files.values()))
    codes, places = set(), set()
    for file, tree in files.items():
        if not file.startswith(within):
            continue
        for call, parameters in calls(tree):
            code = first(call)
            if code is None or called(call) not in names or isinstance(code, ast.Starred):
                continue  # another call, or a reason that is read from a stored report
            if isinstance(code, ast.Constant):
                codes.add(code.value)
            elif ast.unparse(code) not in parameters:
                places.add((file, ast.unparse(code)))
    return codes, places


def test_codes_that_are_chosen_are_known_here() -> None:
    """A new place has to be added to CHOSEN, with all codes that it may give."""
    assert given()[1] == set(CHOSEN)


def test_the_gate_counts_by_its_codes_from_the_start() -> None:
    """A missing one would have no series until the first refusal, which an increase then misses."""
    codes, places = given(("adapters/", "gate/", "safetensors_header.py"))
    assert sorted(codes.union(*(CHOSEN[place] for place in places))) == list(REFUSED)


def test_every_code_is_explained_and_no_other() -> None:
    codes = given()[0].union(*CHOSEN.values())
    rows = {code for code, _, _ in explained()}
    assert codes - rows == set(), "not explained in docs/troubleshooting.md"
    assert rows - codes == set(), "explained, but never given"


def test_every_code_is_explained_once() -> None:
    repeated = [code for code, count in Counter(code for code, _, _ in explained()).items() if count > 1]
    assert not repeated


def test_the_codes_of_the_hostile_adapters_are_explained() -> None:
    """Found another way: by what the gate answers to the corpus."""
    codes = set().union(*(case.codes for case in CORPUS)) - {NAME, TAKEN}
    assert codes and codes <= {code for code, _, _ in explained()}


def test_each_row_has_a_cause_and_a_cure() -> None:
    assert all(len(cause) > 10 and len(cure) > 10 for _, cause, cure in explained())
