"""What an install without extras has to do: vllm, fastapi and what they bring are absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.test_api import readme_lines
from tests.tiny import Draft, Pair

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A module and its arguments on the base install."""
    return subprocess.run(
        [sys.executable, "-m", "tests.base_install", *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_every_command_but_serve_works_and_so_do_the_lines_of_the_readme(pair: Pair, tmp_path: Path) -> None:
    """In one process, since each would import torch."""
    Draft().write(tmp_path / "my-adapter")
    (tmp_path / "models").mkdir()
    for side, folder in (("base", pair.base), ("aligned", pair.aligned)):
        (tmp_path / "models" / side).symlink_to(folder)
    (tmp_path / "store" / "names").mkdir(parents=True)
    (tmp_path / "store" / "audit").mkdir()
    commands = [
        "build --base models/base --aligned models/aligned --out cache",
        "inspect my-adapter --projectors cache",
        "project my-adapter --projectors cache --out out",
        "calibrate --projectors cache",
        "store verify --adapter-store store",
        "audit --adapter-store store",
    ]
    (tmp_path / "script.py").write_text(
        f"{readme_lines()}\nprint(report.accepted)\nfrom safelora_vllm.cli.main import main\n"
        f"for command in {commands}:\n    print(main(command.split()))\n"
    )
    done = run("script", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for told in (
        "True\n",
        "projector cache written to cache\n0\n",
        "my-adapter: accepted, 14 of 14 modules projected\n",
        "14 of 14 modules projected, written to out\n0\n",
        "A random adapter under input-removal",
        "the adapter store is sound: 0 names, 0 uploads\n0\n",
    ):
        assert told in done.stdout, told
    assert "no matching record" in done.stderr and done.stdout.endswith("0\n0\n")
    for out in ("out", "projected"):
        assert (tmp_path / out / "adapter_model.safetensors").exists()


def test_serve_says_what_to_install(tmp_path: Path) -> None:
    done = run("safelora_vllm.cli.main", "serve", "model", "--projectors", "cache", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "safelora-vllm: serve needs vllm and fastapi: install them with pip install '.[vllm]' in the "
        "checkout, or '.[cpu]' on a machine without a GPU\n"
    )
