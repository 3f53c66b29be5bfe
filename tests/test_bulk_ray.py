"""All adapters of a folder on a Ray cluster of this machine: the same results, and processes that die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import safelora_vllm as sl
from safelora_vllm.projectors.cache import ProjectorCache
from tests.tiny import Draft, lora, lora_config

pytest.importorskip("ray", reason="the extra ray is not installed")
ROOT = Path(__file__).parents[1]

# In a process of its own: Ray warns, starts threads and changes signals. Each run is one line of its output.
SCRIPT = """
import json, os, signal, sys
import ray
import safelora_vllm as sl
from safelora_vllm.bulk import on_ray

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
folder, cache, out, deaths = sys.argv[1:]
inner = on_ray._project

def deadly(job, adapter):
    # kill -9 on the process that was given this adapter, each time that its name has a line in the file
    with open(deaths) as file:
        names = file.read().split()
    if adapter["name"] in names:
        names.remove(adapter["name"])
        with open(deaths, "w") as file:
            file.write(" ".join(names))
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(job, adapter)

on_ray._project = deadly
def run(out, names, **options):
    with open(deaths, "w") as file:
        file.write(names)
    report = sl.project_adapters(folder, cache, out, ray="auto", **options)
    print(json.dumps(report.to_dicts()), flush=True)

run(out, "second")
run(out, "")
run(out + "-2", "first first first", jobs=2)
try:
    run(out + "-3", "", policy=sl.Policy(energy=0.3), projector_memory=0)
except sl.SafeLoRAError as error:
    print(json.dumps(str(error)))
assert ray.is_initialized()
"""


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    for number, name in enumerate(("first", "second", "third")):
        Draft(tensors=lora(seed=number)).write(tmp_path / "uploads" / name)
    Draft(lora_config(use_dora=True)).write(tmp_path / "uploads" / "wrong")
    return tmp_path / "uploads"


def test_a_cluster_gives_the_same(uploads: Path, cache: ProjectorCache, tmp_path: Path) -> None:
    """One run whose worker dies once, the same again, one whose worker dies each time, and a wrong one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "ray"
    done = subprocess.run(
        [sys.executable, "script.py", str(uploads), str(cache.folder), str(out), str(tmp_path / "deaths")],
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/tmp", "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told = [line for line in done.stdout.splitlines() if line[:1] in ("[", '"')]  # Ray prints too
    once, again, dead, wrong = map(json.loads, told)
    assert [(r["name"], r["answer"]) for r in once] == [
        ("first", "accepted"), ("second", "accepted"), ("third", "accepted"), ("wrong", "refused"),
    ]  # fmt: skip
    assert all(record["unchanged"] for record in again) and "expected 1 or more" in wrong
    failed = next(record for record in dead if record["name"] == "first")
    assert failed["answer"] == "failed" and failed["reasons"][0]["code"] == "worker_died"
    others = [record["answer"] for record in dead if record["name"] != "first"]
    assert others == ["accepted", "accepted", "refused"]
    assert not (tmp_path / "ray-2" / "first").exists()
    here = sl.project_adapters(uploads, cache, tmp_path / "here")
    for record in here.records:
        places = [tmp_path / "here" / record.name, out / record.name]
        assert _files(places[0]) == _files(places[1])
    # A run here takes up what a run there did.
    assert sl.project_adapters(uploads, cache, out).unchanged == {"first", "second", "third", "wrong"}


def test_a_cluster_that_is_not_there(uploads: Path, cache: ProjectorCache, tmp_path: Path) -> None:
    """The command says so in one sentence."""
    command: list[Any] = [
        sys.executable, "-m", "safelora_vllm.cli", "project", "--all", uploads, "--projectors", cache.folder,
        "--out", tmp_path / "out", "--ray", "nowhere",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "safelora-vllm: the Ray cluster 'nowhere' cannot be used (" in done.stderr.splitlines()[-1]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
