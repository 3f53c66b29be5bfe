"""docs/python-api.md: its examples run, and its reference is made from the docstrings.

python -m tests.test_python_api_docs     writes the reference anew
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import safelora_vllm as sl
import safelora_vllm.errors
from tests.tiny import Draft, Pair, lora_config

PAGE = Path(__file__).parents[1] / "docs" / "python-api.md"
BLOCK = re.compile(
    r"(<!-- (\w+): written by python -m tests\.test_python_api_docs -->\n)(.*?)(<!-- end -->)", re.S
)
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")


def parts(docstring: str) -> dict[str, str]:
    """The text of a docstring before its sections, under "", and each section."""
    found = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(docstring), flags=re.M)
    return {"": found[0].strip(), **dict(zip(found[1::2], map(inspect.cleandoc, found[2::2]), strict=True))}


def items(section: str) -> Iterator[tuple[str, str]]:
    """Name and meaning of each item of a section."""
    for item in re.split(r"\n(?=\S)", section):
        # ``Raises`` has several errors on a line: "KeysError: … PolicyError: …".
        for name, text in re.findall(r"(\w[\w ,]*?): (.*?)(?=(?:(?<=\.) [A-Z]\w+Error: )|$)", item, re.S):
            yield name, shown(" ".join(text.split()))


def shown(text: str) -> str:
    """A docstring's text as Markdown, in a cell of a table too."""
    return text.replace("``", "`").replace("|", "\\|")


def table(heads: str, rows: list[list[str]]) -> str:
    rule = "|" + "---|" * (heads.count("|") - 1)
    return "\n".join([heads, rule, *("| " + " | ".join(row) + " |" for row in rows)])


def signature(name: str, function: Any) -> str:
    """A parameter on each line, with its type and default."""
    lines, keyword_only = [], False
    found = inspect.signature(function)
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("*")
            keyword_only = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{parameter.name}: {parameter.annotation}{default}")
    body = "".join(f"    {line},\n" for line in lines)
    return f"{name}(\n{body}) -> {found.return_annotation}"


def of_function(name: str, function: Any) -> str:
    doc = parts(function.__doc__)
    arguments = table("| argument | meaning |", [[f"`{a}`", b] for a, b in items(doc["Args"])])
    raises = table("| error | when |", [[f"`{a}`", b] for a, b in items(doc["Raises"])])
    text = [f"### {name}", shown(doc[""]), f"```py\n{signature(name, function)}\n```", arguments]
    text += [f"Returns: {shown(' '.join(doc['Returns'].split()))}", raises]
    return "\n\n".join([*text, f"```pycon\n{doc['Example']}\n```"])


def members(cls: type) -> list[list[str]]:
    """Public methods and properties with the first sentence of their docstrings."""
    rows = []
    for name, value in vars(cls).items():
        if name.startswith("_") or not getattr(value, "__doc__", None):
            continue
        if isinstance(value, property):
            rows.append([f"`{name}`", first_line(value)])
        elif isinstance(value, classmethod) or inspect.isfunction(value):
            function = value.__func__ if isinstance(value, classmethod) else value
            given = list(inspect.signature(function).parameters)[1:]
            rows.append([f"`{name}({', '.join(given)})`", first_line(value)])
    return rows


def first_line(value: Any) -> str:
    return shown(" ".join(inspect.cleandoc(value.__doc__).partition("\n\n")[0].split()))


def of_class(name: str, cls: type) -> str:
    doc = parts(cls.__doc__ or "")
    text = [f"### {name}", shown(doc[""])]
    if "Attributes" in doc:
        rows = [[f"`{a}`", b] for a, b in items(doc["Attributes"])]
        text.append(table("| attribute | meaning |", rows))
    if rows := members(cls):
        text.append(table("| member | meaning |", rows))
    if "Raises" in doc:
        text.append(table("| error | when |", [[f"`{a}`", b] for a, b in items(doc["Raises"])]))
    if "Example" in doc:
        text.append(f"```pycon\n{doc['Example']}\n```")
    return "\n\n".join(text)


def reference() -> str:
    names = [name for name in sl.__all__ if name != "__version__"]
    functions = [name for name in names if inspect.isfunction(getattr(sl, name))]
    classes = [name for name in names if name not in functions]
    return "\n\n".join(
        [
            *(of_function(name, getattr(sl, name)) for name in functions),
            *(of_class(name, getattr(sl, name)) for name in classes),
            "### __version__",
            "The installed release, a text. `0+unknown` in a source tree that is not installed.",
        ]
    )


def errors() -> str:
    """The tree of exceptions as their module draws it."""
    drawn = inspect.cleandoc(safelora_vllm.errors.__doc__ or "").split("\n\n")[1]
    return f"```text\n{inspect.cleandoc(drawn)}\n```"


def written(text: str) -> str:
    made = {"reference": reference, "errors": errors}
    return BLOCK.sub(lambda found: f"{found[1]}\n{made[found[2]]()}\n\n{found[4]}", text)


def test_the_reference_is_that_of_the_docstrings() -> None:
    text = PAGE.read_text()
    assert {block[1] for block in BLOCK.findall(text)} == {"reference", "errors"}
    assert text == written(text), "run python -m tests.test_python_api_docs"


@pytest.mark.parametrize("name", [name for name in sl.__all__ if name != "__version__"])
def test_the_reference_has_every_name_with_all_its_parts(name: str) -> None:
    value = getattr(sl, name)
    section = re.split(r"^### ", PAGE.read_text().partition(f"### {name}\n")[2], flags=re.M)[0]
    assert section
    if inspect.isfunction(value):
        assert all(f"| `{argument}` |" in section for argument in inspect.signature(value).parameters)
    if dataclasses.is_dataclass(value):
        assert all(f"| `{field.name}` |" in section for field in dataclasses.fields(value))


def test_the_examples_run_and_print_what_is_said(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order. What a line prints stands behind it as a comment."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "models").mkdir()
    for side, folder in (("base", pair.base), ("aligned", pair.aligned)):
        (tmp_path / "models" / side).symlink_to(folder)
    Draft().write(tmp_path / "my-adapter")
    Draft(lora_config(use_dora=True)).write(tmp_path / "bad-adapter")
    Draft().write(tmp_path / "uploads" / "first")
    Draft(lora_config(use_dora=True)).write(tmp_path / "uploads" / "second")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) >= 4
    for example in examples:
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            exec(example, names)
        assert told.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", example), example


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
