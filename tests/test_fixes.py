"""The bugs of vLLM that we mend: what is documented of them, and the switch."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.seams import fixes
from safelora_vllm.integration.seams.checks import NEWEST, OLDEST
from safelora_vllm.integration.seams.fixes import FIXES, SWITCH
from safelora_vllm.integration.seams.fixes.fix import Fix, original, replace

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("vllm", "torch", "safetensors", "fastapi", "pydantic")))
from safelora_vllm.integration.seams import checks, fixes, server, table
"""
SAFETY = {"base rows", "clean blocks", "prefix cache", "unmapped", "ranks"}


def documented() -> list[list[str]]:
    """The cells of the table in docs/compatibility.md."""
    text = (ROOT / "docs" / "compatibility.md").read_text()
    section = text.partition("## Bugs of vLLM that the guard mends")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def described(fix: Fix) -> list[str]:
    """The cells that a fix should have there, besides its test."""
    last = "still" if fix.fixed_in is None else f"{fix.fixed_in[0]}.{fix.fixed_in[1] - 1}"
    return [
        f"`{fix.name}`",
        fix.why,
        re.sub(r"https\S+/(\d+)", r"[#\1](\g<0>)", fix.upstream),
        f"{OLDEST[0]}.{OLDEST[1]} – {last}",
        f"no: {fix.safety[0].lower()}{fix.safety[1:].rstrip('.')}" if fix.safety else "yes",
    ]


def test_the_documentation_has_each_of_them() -> None:
    rows = documented()
    assert [[*row[:4], row[5]] for row in rows] == [described(fix) for fix in FIXES]


def test_each_has_a_test_that_shows_whether_vllm_still_needs_it() -> None:
    for name, *_, test, _switch in documented():
        file, function = re.fullmatch(r"`(test_\w+\.py)::(test_vllm_still_\w+)`", test).groups()  # type: ignore[union-attr]  # else it fails
        tree = ast.parse((ROOT / "tests" / "server" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_each_is_a_whole_description() -> None:
    assert len({fix.name for fix in FIXES}) == len(FIXES)
    for fix in FIXES:
        assert fix.side == "worker" and fix.requirements and fix.why and fix.until, fix.name
        assert fix.upstream == "none found" or "https://github.com/vllm-project/vllm/" in fix.upstream, (
            fix.name
        )


def test_one_that_no_supported_version_needs_is_removed() -> None:
    for fix in FIXES:
        assert fix.fixed_in is None or OLDEST < fix.fixed_in <= NEWEST, fix.name


@pytest.mark.parametrize(("value", "all_of_them"), [(None, True), ("1", True), ("0", False)])
def test_the_switch(value: str | None, all_of_them: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    found = {fix.name for fix in fixes.chosen(OLDEST)}
    assert found == ({fix.name for fix in FIXES} if all_of_them else SAFETY)


@pytest.mark.parametrize("value", ["", "no", "2", "0 "])
def test_a_wrong_switch(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, value)
    with pytest.raises(GuardError, match=r"is not a valid switch: expected 0 or 1"):
        fixes.chosen(OLDEST)


def test_a_version_that_does_not_need_one_is_left_alone() -> None:
    needless = {fix.name for fix in FIXES} - {fix.name for fix in fixes.chosen(NEWEST)}
    assert needless == {fix.name for fix in FIXES if fix.fixed_in}


def made_up(name: str, safety: str, applied: list[str]) -> Fix:
    return Fix(
        name=name, why="why", until="until", requirements=(), upstream="none found", safety=safety,
        apply=lambda: applied.append(name),
    )  # fmt: skip


@pytest.mark.parametrize("off", [True, False])
def test_what_is_switched_off_is_logged_once(
    off: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    applied: list[str] = []
    monkeypatch.setattr(fixes, "FIXES", tuple(made_up(n, s, applied) for n, s in (("a", ""), ("b", "it"))))
    monkeypatch.setenv(SWITCH, "0" if off else "1")
    fixes.apply.cache_clear()
    with caplog.at_level(logging.INFO, "vllm.safelora"):
        fixes.apply(NEWEST)
        fixes.apply(NEWEST)
    fixes.apply.cache_clear()
    assert applied == (["b"] if off else ["a", "b"])
    logged = [record.getMessage() for record in caplog.records]
    assert logged == ([f"{SWITCH}=0: these bugs of vLLM are not mended: a"] if off else [])


def test_only_the_main_process_logs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fixes, "FIXES", (made_up("a", "", []),))
    monkeypatch.setenv(SWITCH, "0")
    monkeypatch.setattr(fixes.multiprocessing, "parent_process", lambda: object())
    fixes.apply.cache_clear()
    fixes.apply(NEWEST)
    fixes.apply.cache_clear()
    assert not caplog.records


def test_what_they_need_can_be_read_without_vllm() -> None:
    """As `.ci/check_seams` does, and a server before it says that vLLM is missing."""
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_vllms_own_is_remembered() -> None:
    class Owner:
        value = 1

    assert original(Owner, "value") == 1
    replace(Owner, "value", 2)
    replace(Owner, "value", 3)
    assert (Owner.value, original(Owner, "value")) == (3, 1)
