"""Builds as processes of their own: killed in the middle, and measured for memory."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelora_vllm.cli.main import main
from safelora_vllm.errors import UsageError
from safelora_vllm.projectors import build as module
from safelora_vllm.projectors import partial_cache
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from tests.tiny import LLAMA, Pair, module_shapes, write_checkpoint

# Kills itself when the third shard was begun, before or after its line in the journal.
_KILLED = """
import os, signal, sys
from safelora_vllm.projectors import build, partial_cache
build._SHARD_BYTES = 30_000
add, save, written = partial_cache.PartialCache.add, partial_cache.save_file, []
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def saving(tensors, file):
    save(tensors, file)
    written.append(file)
    if len(written) == 3 and sys.argv[4] == "half":
        os.truncate(file, file.stat().st_size // 2)
        kill()
def adding(self, *given):
    add(self, *given)
    if len(written) == 3:
        kill()
partial_cache.save_file, partial_cache.PartialCache.add = saving, adding
build.build(*sys.argv[1:4])
"""
# Goes on with it, and says how many modules it computed.
_CONTINUED = """
import sys
from safelora_vllm.projectors import build
build._SHARD_BYTES = 30_000
inner, computed = build.build_module, []
def counted(name, *given):
    computed.append(name)
    return inner(name, *given)
build.build_module = counted
build.build(*sys.argv[1:4])
print(len(computed))
"""
# Holds the lock of a build until its input ends.
_RUNNING = """
import sys
from pathlib import Path
from safelora_vllm.projectors import partial_cache
with partial_cache.partial_cache(Path(sys.argv[1]), sys.argv[2]):
    print("running", flush=True)
    sys.stdin.read()
"""
# Shards of 1 MB; prints its largest resident size in KB. Not ru_maxrss: a child inherits its parent's.
_MEASURED = """
import sys
from pathlib import Path
from safelora_vllm.projectors import build
build._SHARD_BYTES = 2**20
build.build(*sys.argv[1:4], build.BuildOptions(OPTIONS))
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("when", ["half", "whole"])
def test_a_killed_build_leaves_no_cache_and_is_continued(when: str, pair: Pair, tmp_path: Path) -> None:
    out, models = tmp_path / "cache", (pair.base, pair.aligned)
    assert python(_KILLED, *models, out, when).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    finished = (leftover / ".journal").read_bytes().splitlines()
    assert leftover.name.startswith(".cache.partial-") and len(finished) == (2 if when == "half" else 3)
    with (leftover / ".journal").open("ab") as journal:
        journal.write(b'{"shard": "projectors-000')  # as a killed build may leave it

    done = python(_CONTINUED, *models, out)
    assert done.returncode == 0, done.stderr
    computed, modules = int(done.stdout), len(module_shapes())
    assert f"continuing: {modules - computed} of {modules} modules are finished" in done.stderr
    whole = tmp_path / "whole"
    at_once = python(_CONTINUED, *models, whole)
    assert "continuing" not in at_once.stderr
    assert 0 < int(done.stdout) < int(at_once.stdout) == len(module_shapes())
    cache = ProjectorCache(out)
    cache.verify()
    assert cache.id == ProjectorCache(whole).id
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "whole"}


def test_a_finished_shard_that_was_damaged_is_made_again(pair: Pair, tmp_path: Path) -> None:
    out, models = tmp_path / "cache", (pair.base, pair.aligned)
    assert python(_KILLED, *models, out, "whole").returncode == -signal.SIGKILL
    (shard,) = tmp_path.glob(".cache.partial-*/projectors-00001.safetensors")
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    assert python(_CONTINUED, *models, out).returncode == 0
    ProjectorCache(out).verify()


def test_a_build_with_other_options_does_not_continue_it(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    assert python(_KILLED, pair.base, pair.aligned, out, "whole").returncode == -signal.SIGKILL
    assert main(["build", "--base", str(pair.base), "--aligned", str(pair.aligned), "--out", str(out)]) == 0
    assert list(tmp_path.iterdir()) == [out]
    assert ProjectorCache(out).id == ProjectorCache(build(pair.base, pair.aligned, tmp_path / "b")).id


@pytest.mark.parametrize("key", ["0" * 64, None], ids=["others", "the same"])
def test_a_second_build_of_the_same_place_is_refused(key: str | None, pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    if key is None:
        models = Checkpoint(pair.base), Checkpoint(pair.aligned)
        key = module._key(models, module.select_modules(*models, ()), BuildOptions())
    command = [sys.executable, "-c", _RUNNING, str(out), key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None and running.stdout is not None
        assert running.stdout.readline() == "running\n"
        with pytest.raises(
            UsageError, match=rf"another build of .*cache is running, process {running.pid}: wait"
        ):
            build(pair.base, pair.aligned, out)
        running.kill()
    build(pair.base, pair.aligned, out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_keeps_what_is_finished(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "cache", list[Path]()

    def filling(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, file)
        written.append(file)

    monkeypatch.setattr(module, "_SHARD_BYTES", 30_000)
    monkeypatch.setattr(partial_cache, "save_file", filling)
    with pytest.raises(UsageError, match=r"no room left on the disk .* the \d+ finished modules are kept"):
        build(pair.base, pair.aligned, out)
    states = [file.stat().st_mtime_ns for file in written]
    monkeypatch.setattr(partial_cache, "save_file", save_file)
    ProjectorCache(build(pair.base, pair.aligned, out)).verify()
    assert [(out / file.name).stat().st_mtime_ns for file in written] == states


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ('exact=True, dtype="float32", form="factored"', [(64, 8192), (8192, 64)]),  # 2 MB each
        ("", [(640, 1024), (1024, 640)]),  # with few dominant directions
    ],
    ids=["factored", "thin"],
)
def test_memory_does_not_grow_with_the_number_of_layers(
    options: str, shapes: list[tuple[int, int]], tmp_path: Path
) -> None:
    peaks = []
    for layers in (4, 24):
        generator = torch.Generator().manual_seed(layers)
        for side in ("base", "aligned"):
            state = {
                f"model.layers.{i}.self_attn.{part}_proj.weight": torch.randn(shape, generator=generator)
                * torch.arange(1, shape[1] + 1).pow(-0.4)
                for i in range(layers)
                for part, shape in zip("qo", shapes, strict=True)
            }
            write_checkpoint(tmp_path / f"{side}{layers}", state, config=LLAMA)
        pair = tmp_path / f"base{layers}", tmp_path / f"aligned{layers}"
        done = python(_MEASURED.replace("OPTIONS", options), *pair, tmp_path / f"cache{layers}")
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


def test_a_folder_that_others_may_write_to_is_not_continued(pair: Pair, tmp_path: Path) -> None:
    """What is in it would become a part of the cache."""
    started: list[Path] = []

    def make() -> Path:
        return build(pair.base, pair.aligned, tmp_path / "cache")

    def stop(*_: object) -> None:
        started.extend(tmp_path.glob(".cache.partial-*"))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(partial_cache.PartialCache, "add", stop)
        make()
    (folder,) = started
    told = f"{re.escape(str(folder))} is not a folder that only this user can write to.* Remove it, or give"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UsageError, match=told):
        make()
    folder.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "precious").touch()
    folder.symlink_to(elsewhere)
    with pytest.raises(UsageError, match=told):
        make()
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    folder.unlink()
    (tmp_path / ".cache.partial-x").mkdir()  # of a build of `cache.partial-x`, or whatever it is
    link = tmp_path / f".cache.partial-{'1' * 32}"
    link.symlink_to(elsewhere)
    ProjectorCache(make()).verify()
    assert (
        (tmp_path / ".cache.partial-x").is_dir() and link.is_symlink() and (elsewhere / "precious").exists()
    )


def test_an_edited_model_is_not_continued_with(pair: Pair, tmp_path: Path) -> None:
    """Not even where the samples of its fingerprint are the same."""
    keys, base = [], Path(shutil.copytree(pair.base, tmp_path / "base"))
    file = next(base.glob("*.safetensors"))
    for size in (0, 1, 0):
        models = Checkpoint(base), Checkpoint(pair.aligned)
        keys.append(module._key(models, ["x"], BuildOptions()))
        os.utime(file, ns=(10**18 + size, 10**18 + size))
    assert keys[0] != keys[1] != keys[2]
    assert module._key(models, ["x"], BuildOptions()) != keys[2]
