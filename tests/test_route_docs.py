"""The tables of routes in the documentation are those of the code.

python -m tests.test_route_docs     writes them anew
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from safelora_vllm.integration.server.access_rules import REFUSED, TABLE, Access

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(<!-- (\w+): written by python -m tests\.test_route_docs -->\n)(.*?)(<!-- end -->)", re.S
)
DOCUMENTS = (ROOT / "docs" / "routes.md",)


def shown(name: str) -> str:
    """``GET /v1/adapters/{name}``; a mounted application has no method."""
    return f"`{name.removeprefix('* ').replace('{name:path}', '{name}')}`"


def routes() -> str:
    rows = [f"| {shown(name)} | {access.value} |" for name, access in TABLE.items()]
    return "\n".join(["| route | who may |", "|---|---|", *rows, "| everything else | admin |"])


def groups() -> str:
    rows = [
        f"| {access.value} | {', '.join(shown(name) for name, given in TABLE.items() if given is access)} |"
        for access in Access
    ]
    rows[-1] = f"{rows[-1].removesuffix(' |')}, and **every route that is not in this table** |"
    return "\n".join(["| who may | routes |", "|---|---|", *rows])


def refused() -> str:
    reasons: dict[str, list[str]] = {}
    for name, refusal in REFUSED.items():
        reasons.setdefault(refusal.reason, []).append(shown(name))
    rows = [f"| {', '.join(names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(["| route | why, and what to do |", "|---|---|", *rows])


TABLES: dict[str, Callable[[], str]] = {"routes": routes, "groups": groups, "refused": refused}


def written(text: str) -> str:
    """A document with its tables as they have to be."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_code(document: Path) -> None:
    text = document.read_text()
    assert BLOCK.search(text)
    assert text == written(text), "run python -m tests.test_route_docs"


def test_every_table_is_in_a_document() -> None:
    found = {block[1] for document in DOCUMENTS for block in BLOCK.findall(document.read_text())}
    assert found == set(TABLES)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(written(document.read_text()))
