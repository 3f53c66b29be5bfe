"""The floors of the package: a folder a process, imports only downwards, and no vLLM below integration."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import safelora_vllm
from tests.base_install import SERVER_ONLY
from tests.conftest import NEEDS_SERVER

PACKAGE = Path(safelora_vllm.__file__).parent
# Each imports only what stands before it, wherever in a file the import is.
FLOORS = (
    "errors", "files", "durations", "safetensors_header", "projectors", "served_model", "methods", "policy",
    "exam", "report", "page", "adapters", "signatures", "remote", "store", "tenants", "settings",
    "metric_table", "gate", "bulk", "api", "integration", "cli",
)  # fmt: skip


@cache
def modules(folder: Path = PACKAGE) -> dict[str, Path]:
    """Every module of a package with its file."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imported(file: Path, top_level: bool = False) -> set[str]:
    """Names that a file imports, anywhere in it or at its top level only; not those for type checkers."""
    names: set[str] = set()
    stack: list[ast.AST] = [ast.parse(file.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        stack.extend(ast.iter_child_nodes(node))
    return names


def roots(names: set[str]) -> set[str]:
    """The top-level packages of some names."""
    return {name.partition(".")[0] for name in names}


@cache
def loaded(start: str, top_level: bool = False) -> set[str]:
    """Modules of this package that a module loads, also through others, with the packages around them."""
    found, seen, stack = modules(), set[str](), [start]
    while stack:
        name = stack.pop()
        if name not in found or name in seen:
            continue
        seen.add(name)
        stack += [name.rpartition(".")[0], *imported(found[name], top_level)]
    return seen


def within(name: str, folder: str) -> bool:
    """Whether a module is in a folder of the package, or the module of that name."""
    return f"{name}.".startswith(f"safelora_vllm.{folder}.")


def test_only_integration_imports_vllm_or_fastapi() -> None:
    found = modules()
    assert len(found) > 25
    for name, file in found.items():
        used = roots(imported(file)) & {"vllm", "fastapi", "starlette", "uvicorn"}
        assert not used or within(name, "integration"), name
    # The test sees such imports: this is where they are.
    assert "vllm" in {r for n, f in found.items() if within(n, "integration") for r in roots(imported(f))}


def test_each_room_imports_only_rooms_below_it() -> None:
    for name, file in modules().items():
        if name == "safelora_vllm":
            continue
        room = name.split(".")[1]
        assert room in FLOORS, f"{name}: give its room a place in FLOORS"
        above = FLOORS[FLOORS.index(room) + 1 :]
        wrong = {t for t in imported(file) if any(within(t, other) for other in above)}
        assert not wrong, f"{name} imports {sorted(wrong)}, which are above it"


def test_no_module_imports_what_imports_it() -> None:
    """Each module can be put on a floor above everything that it imports when loaded."""
    found = modules()
    below = {n: (imported(file, top_level=True) & set(found)) - {n} for n, file in found.items()}
    for name, targets in below.items():  # a package is not above what its own modules import
        targets -= {target for target in targets if name.startswith(f"{target}.")}
    placed: set[str] = set()
    while below:
        floor = {name for name, targets in below.items() if targets <= placed}
        assert floor, f"these import each other: {sorted(below)}"
        placed |= floor
        below = {name: targets for name, targets in below.items() if name not in floor}


@pytest.mark.parametrize(
    ("process", "others"),
    [
        ("gate", ["integration", "cli", "api"]),
        ("integration.worker", ["integration.server", "integration.launch", "cli", "api"]),
        ("integration.server", ["integration.worker", "integration.launch", "cli", "api"]),
        ("api", ["integration", "cli", "settings"]),
    ],
)
def test_a_process_never_loads_the_code_of_another(process: str, others: list[str]) -> None:
    members = [name for name in modules() if within(name, process)]
    assert members
    for name in members:
        wrong = {t for t in loaded(name) for other in others if within(t, other)}
        assert not wrong, f"{name} loads {sorted(wrong)}"


def test_what_vllm_imports_before_it_checks_anything_is_the_standard_library() -> None:
    # vLLM logs and swallows an ImportError there, and would go on unguarded.
    for name in loaded("safelora_vllm.integration.plugin", top_level=True):
        assert roots(imported(modules()[name], top_level=True)) <= sys.stdlib_module_names, name
    script = (
        "import sys; before = set(sys.modules); import safelora_vllm.integration.plugin\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "safelora_vllm" in done.stdout, done.stderr
    assert set(done.stdout.split()) - {"safelora_vllm"} <= sys.stdlib_module_names


def test_the_extension_class_puts_the_guard_in_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM imports it in every worker, also where it has not loaded the plugin."""
    from safelora_vllm.integration import plugin

    calls: list[str] = []
    monkeypatch.setattr(plugin, "register", lambda: calls.append("register"))
    monkeypatch.delitem(sys.modules, "safelora_vllm.integration.required", raising=False)
    assert "Guard" in runpy.run_module("safelora_vllm.integration.required")
    assert calls == ["register"]


def test_everything_but_integration_imports_without_vllm_and_fastapi(tmp_path: Path) -> None:
    names = [name for name in modules() if not within(name, "integration")]
    names.remove("safelora_vllm.settings")  # of a server
    names += ["safelora_vllm.integration", "safelora_vllm.integration.plugin"]
    (tmp_path / "everything.py").write_text("\n".join(f"import {name}" for name in names))
    done = subprocess.run(
        [sys.executable, "-m", "tests.base_install", "everything"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_fast_tests_need_no_vllm_or_fastapi() -> None:
    """Those that do are left out where these are missing: `conftest.NEEDS_SERVER` finds them."""
    tests = modules(Path(__file__).parent)
    package = modules()
    kept = {
        name
        for name, file in tests.items()
        if re.fullmatch(r"tests\.test_\w+", name) and not NEEDS_SERVER.search(file.read_text())
    }
    assert len(kept) > 30 and "tests.test_gate" in kept and "tests.test_access_check" not in kept
    for name in kept:
        stack, seen = [name], set[str]()
        while stack:
            module = stack.pop()
            if module in seen or module not in tests:
                continue
            seen.add(module)
            names = imported(tests[module])
            stack += names
            needed = {t for n in names & set(package) for t in loaded(n, top_level=True)}
            for file in [tests[module], *(package[n] for n in needed)]:
                wrong = roots(imported(file, top_level=file in package.values())) & set(SERVER_ONLY)
                assert not wrong, f"{name} needs {sorted(wrong)} for {file}"


def test_help_and_policies_do_not_wait_for_torch() -> None:
    script = (
        "import sys, safelora_vllm.cli.main as c; c._parser()\n"
        "import safelora_vllm as sl; sl.Policy(); sl.Report; sl.AdapterRefused\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
