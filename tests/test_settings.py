"""What ``--additional-config`` may say, and where settings have to be named besides."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.cli.main import _parser, _settings
from safelora_vllm.cli.options import size, size_text
from safelora_vllm.errors import GuardError
from safelora_vllm.settings import FIELDS, ServerSettings
from safelora_vllm.store.layout import default_root

README = Path(__file__).parent.parent / "README.md"
# Each option of ``serve`` that is a setting, with a value; the other settings stand in the section only.
OPTIONS: dict[str, tuple[list[str], Any]] = {
    "projectors": (["--projectors", "/p"], "/p"),
    "store": (["--adapter-store", "/s"], "/s"),
    "trust_served_model": (["--trust-served-model"], True),
    "max_adapter_bytes": (["--max-adapter-bytes", "1KB"], 1000),
    "store_bytes": (["--store-bytes", "2KB"], 2000),
    "keys": (["--keys", "/k"], "/k"),
    "adapter_roots": (["--adapter-root", "/a", "--adapter-root", "/b"], ["/a", "/b"]),
    "concurrent_uploads": (["--concurrent-uploads", "3"], 3),
    "allow_hub": (["--allow-hub"], True),
    "private_docs": (["--private-docs"], True),
    "route_access": (["--route-access", "GET /x=users"], {"GET /x": "users"}),
}
SECTION_ONLY = {"projector_bytes", "policy"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"projectors": 5}, "projectors"), ({"policy": None}, "policy"), ({"policy": []}, "policy"),
        ({"projector_bytes": "x"}, "projector_bytes"), ({"projector_bytes": True}, "projector_bytes"),
        ({"allow_hub": "no"}, "allow_hub"), ({"adapter_roots": "/data"}, "adapter_roots"),
        ({"nonsense": 1}, "nonsense"), ({"route_access": {"GET /": 1}}, "route_access"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(GuardError, match=named):
        ServerSettings.from_additional_config({"safelora": {"projectors": "p", **values}})


def test_all_that_is_wrong_is_named_at_once() -> None:
    values = {"projectors": "p", "store_bytes": "x", "allow_hub": 1}
    with pytest.raises(GuardError) as error:
        ServerSettings.from_additional_config({"safelora": values})
    assert "store_bytes is 'x': Expected `int | null`, got `str`" in str(error.value)
    assert "allow_hub is 1: Expected `bool`, got `int`" in str(error.value)


def test_a_path_may_be_one() -> None:
    found = ServerSettings.from_additional_config({"safelora": {"projectors": Path("p"), "store": Path("s")}})
    assert (found.projectors, found.store) == ("p", "s")


def test_a_section_comes_back_from_what_it_says() -> None:
    settings = ServerSettings("p", policy={"energy": 0.3}, adapter_roots=["a"], store_bytes=5)
    assert ServerSettings.from_additional_config(settings.to_section()) == settings


def settings(*options: str) -> ServerSettings:
    """Those of ``serve``."""
    return _settings(_parser().parse_args(["serve", "model", *options]), {})


def test_every_setting_has_an_option_or_stands_in_the_section_only() -> None:
    assert set(OPTIONS) | SECTION_ONLY == set(FIELDS) and not set(OPTIONS) & SECTION_ONLY
    given = settings(*(word for options, _ in OPTIONS.values() for word in options))
    assert {name: getattr(given, name) for name in OPTIONS} == {
        name: value for name, (_, value) in OPTIONS.items()
    }


def test_what_is_not_given_has_its_default() -> None:
    assert settings("--projectors", "/p", "--keys", "", "--adapter-store", "") == ServerSettings("/p")
    assert ServerSettings("/p").store == str(default_root())
    assert settings("--projectors", "p").projectors == str(Path("p").resolve())


def configuration() -> dict[str, str]:
    """Rows of the README's table of settings by the setting that they name."""
    text = README.read_text()
    table = text[text.index("| where | setting | meaning |") :].partition("\n\n")[0]
    return {name: row for row in table.splitlines() for name in re.findall(r"`([a-z_]+)`", row.split("|")[2])}


def test_the_readme_names_every_setting_and_its_default() -> None:
    rows = configuration()
    assert set(FIELDS) <= set(rows)
    fields = {field.name: field.default for field in dataclasses.fields(ServerSettings)}
    assert f"default {fields['concurrent_uploads']} " in rows["concurrent_uploads"]
    assert f"default {size_text(fields['max_adapter_bytes'])} " in rows["max_adapter_bytes"].replace(
        " GiB", "GiB"
    )
    for name, (options, _) in OPTIONS.items():
        assert f"`{options[0]}`" in rows[name]


def test_the_help_has_the_defaults() -> None:
    (commands,) = (action for action in _parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    text = " ".join(commands.choices["serve"].format_help().split())
    assert "largest file; default: 2GiB" in text and "per API server; default: 8" in text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0TiB"), (1, "1B"), (1500, "1500B"), (2 * 2**30, "2GiB"), (3000, "3KB")],
)
def test_a_size_is_written_as_it_is_read(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text and size(text) == nbytes
