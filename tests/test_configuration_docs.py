"""The tables of options and settings in docs/configuration.md are those of the code.

python -m tests.test_configuration_docs     writes them anew
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from safelora_vllm import cli
from safelora_vllm.adapters.read import Limits
from safelora_vllm.cli.main import _parser
from safelora_vllm.cli.options import size_text
from safelora_vllm.methods import METHODS, Method
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.manifest import WHOLE
from safelora_vllm.settings import FIELDS, ServerSettings
from safelora_vllm.store.layout import DEFAULT_ROOT

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "configuration.md"
BLOCK = re.compile(
    r"(<!-- ([\w-]+): written by python -m tests\.test_configuration_docs -->\n)(.*?)(<!-- end -->)", re.S
)
COMMANDS = (
    "build", "inspect", "project", "plan", "calibrate", "exam", "store ls", "store gc", "store verify",
    "store rm", "store preview", "audit", "statement", "top",
)  # fmt: skip
POLICY = tuple(field.name for field in dataclasses.fields(Policy))
# Commands whose options may have the name of a field of the policy, and mean something else.
WITHOUT_POLICY = ("exam",)
# Variables that vLLM and the hub's client read, and that the page explains all the same.
OF_OTHERS = {"VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"}
# Variables that the server's processes set for each other.
INTERNAL = {"SAFELORA_ADMIN_API_KEY_MADE"}
_MARKED = re.compile(
    r"(?<![\w/~.-])(--[a-z][\w-]*|\$?[A-Z]+_[A-Z_]+(?:/[\w-]+)?|[a-z]+_[a-z_]+|~?/[a-z.]+[\w./-]*)"
)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of its commands."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command, or of one of ``store``'s own."""
    parser = _parser()
    for word in command.split():
        parser = choices(parser)[word]
    return parser


def actions(command: str) -> list[argparse.Action]:
    """All but ``--help`` and the policy, which has a table of its own."""
    left_out = {"help"} if command in WITHOUT_POLICY else {"help", *POLICY}
    return [a for a in parser_of(command)._actions if a.dest not in left_out]


def shown(action: argparse.Action) -> str:
    """``--modules NAME ...``, or the name of an argument without an option."""
    value = str(action.metavar or action.dest if action.nargs != 0 else "").strip("'")
    if action.choices and not action.metavar:
        value = f"{{{','.join(map(str, action.choices))}}}"
    elif action.option_strings and not action.metavar:
        value = value.upper()
    words = [*action.option_strings, f"'{value}'" if " " in value else value, "..." * (action.nargs == "+")]
    return f"`{' '.join(filter(None, words))}`"


def meaning(action: argparse.Action) -> str:
    """The help without its default."""
    return code(re.sub(r" \(default\)|(?:^|; )default: .*$", "", action.help or ""))


def default(action: argparse.Action) -> str:
    """Of the parser, or what the help says."""
    if action.required:
        return "required"
    if action.nargs == 0:
        return "off"
    if found := re.search(r"default: (.*)$", action.help or ""):
        return code(found[1])
    return f"`{action.default}`" if action.default not in (None, []) else "none"


def code(text: str) -> str:
    """Options, values and variables in a help text, as code."""
    text = re.sub(r"``([^`]+)``", r"`\1`", " ".join(text.split()))
    text = re.sub(r"(?<!\w)'([^']+)'", r"`\1`", text)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _MARKED.sub(r"`\1`", part) for part in parts)


def attributes(cls: type) -> dict[str, str]:
    """What a class's docstring says of each of its attributes."""
    (section,) = re.findall(r"Attributes:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(cls) or "", re.S)
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section, re.S | re.M)
    return {name: code(text).rstrip(".") for name, text in entries}


def policy() -> str:
    meanings = attributes(Policy)
    options = {action.dest: action for action in parser_of("serve")._actions if action.dest in POLICY}
    rows = []
    for field in dataclasses.fields(Policy):
        condition, values = Policy()._condition(field.name)
        needs = f"`{condition}` is {' or '.join(f'`{value}`' for value in values)}" if values else ""
        action = options.get(field.name)
        given = (shown(action), default(action)) if action else ("none", f"`{str(field.default).lower()}`")
        rows.append((given[0], f"`{field.name}`", given[1], needs, meanings[field.name]))
    return table(("option", "field", "default", "has an effect only where", "meaning"), rows)


def _order(method: Method) -> str:
    option = method.options.get("energy")
    return "not read" if option is None else "yes: more is stricter" if option.more_is_stricter else "no"


def methods() -> str:
    rows = [
        (
            f"`{name}`",
            f"`{method.select}`",
            f"{method.energy:g}" if "energy" in method.options else "not read",
            *(_output_bases(name, thin) for thin in (True, False)),
            "yes" if method.calibrator else "no",
            _order(method),
        )
        for name, method in METHODS.items()
    ]  # fmt: skip
    head = ("method", "default `select`", "default `energy`", "keeps L of a thin cache in memory",
            "of an exact cache", "`calibrate` knows it", "`energy` has an order of strictness")  # fmt: skip
    return table(head, rows)


def _output_bases(method: str, thin: bool) -> str:
    """How much of L the gate keeps under a method with its own selection."""
    share = parts_read(Policy(method=method), thin).output_energy
    return {0.0: "no", WHOLE: "all"}.get(share, "up to the energy")


def serve() -> str:
    """Options of ``serve`` and the settings that only the section has."""
    meanings, rows = attributes(ServerSettings), []
    fields = {field.name: field for field in dataclasses.fields(ServerSettings)}
    options = actions("serve")
    for action in options:
        setting = action.dest if action.dest in FIELDS else ""
        rows.append(
            (shown(action), f"`{setting}`" if setting else "",
             setting_default(fields[setting]) if setting else default(action),
             meanings[setting] if setting else meaning(action))
        )  # fmt: skip
    for name in FIELDS:
        if name not in {action.dest for action in options}:
            rows.append(("", f"`{name}`", setting_default(fields[name]), meanings[name]))
    return table(("option", "setting in the section", "default", "meaning"), rows)


def setting_default(field: dataclasses.Field[object]) -> str:
    if field.name == "store":
        return code(DEFAULT_ROOT)
    if field.default is dataclasses.MISSING:
        return "none" if field.default_factory is not dataclasses.MISSING else "required"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if field.default is None:
        return "none"
    return size_text(field.default) if "bytes" in field.name else str(field.default)  # type: ignore[arg-type]


def bounds() -> str:
    limits = Limits()
    rows = [
        ("`adapter_config.json`", size_text(limits.config_bytes)),
        ("header of `adapter_model.safetensors`", size_text(limits.header_bytes)),
        ("largest rank without a server (`inspect`, `project`)", str(limits.max_rank)),
    ]
    return table(("what", "largest"), rows)


def command(name: str) -> Callable[[], str]:
    return lambda: table(
        ("argument", "default", "meaning"),
        [(shown(a), default(a), meaning(a)) for a in actions(name)],
    )


TABLES: dict[str, Callable[[], str]] = {
    "policy": policy, "methods": methods, "serve": serve, "bounds": bounds,
    **{name.replace(" ", "-"): command(name) for name in COMMANDS},
}  # fmt: skip


def written(text: str) -> str:
    """The document with its tables as they have to be."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


def section(title: str) -> str:
    """The text under a heading."""
    return DOCUMENT.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_tables_are_those_of_the_code() -> None:
    text = DOCUMENT.read_text()
    assert text == written(text), "run python -m tests.test_configuration_docs"


def test_every_table_is_in_the_document_once() -> None:
    assert sorted(block[1] for block in BLOCK.findall(DOCUMENT.read_text())) == sorted(TABLES)


def test_every_command_has_a_table() -> None:
    commands = choices(_parser())
    own = {f"store {name}" for name in choices(commands["store"])}
    assert {"serve", *COMMANDS} == (set(commands) - {"store"}) | own


@pytest.mark.parametrize("name", ["serve", *COMMANDS])
def test_every_option_says_what_it_does(name: str) -> None:
    """In its help, besides the default."""
    assert not [shown(action) for action in parser_of(name)._actions if not meaning(action)]


def test_every_setting_has_a_meaning() -> None:
    assert set(attributes(ServerSettings)) == set(FIELDS)
    assert set(attributes(Policy)) == set(POLICY)


def read_variables() -> set[str]:
    """Environment variables that the package's source reads or sets."""
    sources = "".join(file.read_text() for file in (ROOT / "safelora_vllm").rglob("*.py"))
    return set(re.findall(r'"((?:SAFELORA|VLLM|XDG)_[A-Z_]+)"', sources))


def test_the_environment_variables_are_those_of_the_code() -> None:
    named = {row.split("|")[1].strip(" `") for row in section("Environment variables").splitlines()
             if row.startswith("| `")}  # fmt: skip
    assert read_variables() - INTERNAL | OF_OTHERS == named


def test_the_exit_codes_are_those_of_the_code() -> None:
    codes = [int(row.split("|")[1]) for row in section("Exit codes").splitlines() if re.match(r"\| \d", row)]
    assert codes == [cli.DONE, cli.PROBLEMS, cli.USAGE, cli.REFUSED]


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
