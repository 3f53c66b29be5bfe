"""The floors of the package: what imports what, and that it works where vLLM is not installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import safelora_vllm

PACKAGE = Path(safelora_vllm.__file__).parent
_WITHOUT_VLLM = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "fastapi"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not {"vllm", "fastapi"} & set(sys.modules)
print("imported")
"""


def modules() -> dict[str, Path]:
    """Every module of the package with its file."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


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


def integration(name: str) -> bool:
    """Whether a module belongs to the part that knows vLLM."""
    return name.startswith("safelora_vllm.integration")


def test_only_integration_imports_vllm_or_fastapi() -> None:
    found = modules()
    assert len(found) > 25 and any(map(integration, found))
    for name, file in found.items():
        roots = {target.partition(".")[0] for target in imported(file)}
        assert integration(name) or not roots & {"vllm", "fastapi", "starlette", "uvicorn"}, name
    # The test sees such imports: this is where they are.
    assert "vllm" in {t.partition(".")[0] for n, f in found.items() if integration(n) for t in imported(f)}


def test_nothing_below_knows_integration_and_nothing_knows_the_command() -> None:
    for name, file in modules().items():
        targets = imported(file)
        if name != "safelora_vllm.cli.main" and not integration(name):
            assert not any(map(integration, targets)), name
        assert not any(t.startswith("safelora_vllm.cli.main") for t in targets), name
    assert not any(map(integration, imported(PACKAGE / "cli.py", top_level=True)))


def test_imports_only_go_down() -> None:
    """No cycle: each module can be put on a floor above everything that it imports when loaded."""
    found = modules()
    below = {n: (imported(file, top_level=True) & set(found)) - {n} for n, file in found.items()}
    for name, targets in below.items():  # a package is not above what its own modules import
        targets.discard("safelora_vllm")
        if not name.startswith("safelora_vllm.methods"):
            continue
        targets.discard("safelora_vllm.methods")
    placed: set[str] = set()
    while below:
        floor = {name for name, targets in below.items() if targets <= placed}
        assert floor, f"these import each other: {sorted(below)}"
        placed |= floor
        below = {name: targets for name, targets in below.items() if name not in floor}


def test_the_entry_point_module_imports_the_standard_library_only() -> None:
    # vLLM logs and swallows an ImportError there, and would go on unguarded.
    for name in ("plugin", "__init__"):
        targets = imported(PACKAGE / "integration" / f"{name}.py", top_level=True)
        assert {target.partition(".")[0] for target in targets} <= sys.stdlib_module_names


def test_everything_but_integration_imports_without_vllm_and_fastapi() -> None:
    names = [name for name in modules() if not integration(name)]
    names += ["safelora_vllm.integration", "safelora_vllm.integration.plugin"]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_VLLM, *names],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys, safelora_vllm.cli.main as c; c._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_the_public_surface() -> None:
    assert safelora_vllm.__all__ == ["__version__"]
    public = {name for name in vars(safelora_vllm) if not name.startswith("_")}
    submodules = {name.split(".")[1] for name in modules() if name.count(".") >= 1}
    assert public - submodules <= {"PackageNotFoundError", "version"}
