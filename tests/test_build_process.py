"""Builds as processes of their own: killed in the middle, and measured for memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safelora_vllm.cli.main import main
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache
from tests.tiny import LLAMA, Pair, write_checkpoint

# Kills itself after the second shard was written.
_KILLED = """
import os, signal, sys
from safelora_vllm.projectors import build
build._SHARD_BYTES = 10_000
save, written = build.save_file, []
def killing(tensors, file):
    save(tensors, file)
    written.append(file)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
build.save_file = killing
build.build(*sys.argv[1:4])
"""
# Shards of 1 MB; prints its largest resident size in KB. Not ru_maxrss: a child inherits its parent's.
_MEASURED = """
import sys
from pathlib import Path
from safelora_vllm.projectors import build
build._SHARD_BYTES = 2**20
build.build(*sys.argv[1:4], build.BuildOptions(exact=True, dtype="float32", form="factored"))
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_killed_build_leaves_no_cache_and_can_be_run_again(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    assert python(_KILLED, pair.base, pair.aligned, out).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".cache.partial-") and len(list(leftover.iterdir())) == 2

    assert main(["build", "--base", str(pair.base), "--aligned", str(pair.aligned), "--out", str(out)]) == 0
    assert list(tmp_path.iterdir()) == [out]
    cache = ProjectorCache(out)
    cache.verify()
    assert cache.id == ProjectorCache(build(pair.base, pair.aligned, tmp_path / "b", BuildOptions())).id


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    shapes = {"self_attn.q_proj": (64, 8192), "self_attn.o_proj": (8192, 64)}  # 2 MB each
    peaks = []
    for layers in (4, 24):
        generator = torch.Generator().manual_seed(layers)
        for side in ("base", "aligned"):
            state = {
                f"model.layers.{i}.{part}.weight": torch.randn(shape, generator=generator)
                for i in range(layers)
                for part, shape in shapes.items()
            }
            write_checkpoint(tmp_path / f"{side}{layers}", state, config=LLAMA)
        pair = tmp_path / f"base{layers}", tmp_path / f"aligned{layers}"
        done = python(_MEASURED, *pair, tmp_path / f"cache{layers}")
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    # The larger pair is 80 MB a model and 80 MB of cache larger. Holding any of the three would show.
    assert peaks[1] - peaks[0] < 40e6


@pytest.mark.parametrize("name", ["cache", "c[a]che"])
def test_leftovers_are_found_whatever_the_folder_is_called(name: str, pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / name
    (tmp_path / f".{name}.partial-{2**22 + 1}").mkdir()
    build(pair.base, pair.aligned, out)
    assert list(tmp_path.iterdir()) == [out]
