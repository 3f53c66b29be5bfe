"""Several gates on one store, and gates that are killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from safelora_vllm.store.housekeeping import clean
from tests.tiny import Draft

_PROCESSES = 6
_ROUNDS = 8
# Processes of their own, not forks of this one; torch is imported once for all of them.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["safelora_vllm.gate.admit"])


def admit_at_once(cache: Path, root: Path, start: Barrier, answers: Any) -> None:
    """In a process of its own: rounds of the same adapter, all processes at the same moment."""
    settings = GateSettings(ProjectorCache(cache), Policy(method="safe-lora"))
    for turn in range(_ROUNDS):
        start.wait(60)
        try:
            admission = admit(root / f"adapter{turn}", "tenant", settings, PublishedStore(root / "store"))
            answers.put((turn, admission.key, admission.report.accepted))
        except Exception as error:  # the test shows it
            answers.put((turn, None, repr(error)))


def die_at(call: str, cache: Path, root: Path) -> None:
    """In a process of its own: admit an adapter, killed inside a call of the store."""
    owner: Any = Path if call == "rename" else os
    written: list[object] = []
    inner = getattr(owner, call)

    def killing(target: object, *arguments: Any) -> object:
        written.append(target)
        if len(written) == 2 or call == "rename":
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(target, *arguments)

    setattr(owner, call, killing)
    admit(
        root / "adapter",
        "tenant",
        GateSettings(ProjectorCache(cache), Policy(method="safe-lora")),
        PublishedStore(root / "store"),
    )


def test_many_processes_admit_the_same_adapter(cache: ProjectorCache, tmp_path: Path) -> None:
    """Fresh ones in the even rounds, with a damaged copy already there in the odd ones."""
    settings, store = GateSettings(cache, Policy(method="safe-lora")), PublishedStore(tmp_path / "store")
    keys = {}
    for turn in range(_ROUNDS):
        draft = Draft()
        draft.config["lora_alpha"] = 4 + turn
        folder = draft.write(tmp_path / f"adapter{turn}")
        admission = admit(folder, "tenant", settings, store)
        assert admission.folder is not None
        keys[turn] = admission.key
        if turn % 2:
            (admission.folder / "adapter_model.safetensors").write_bytes(b"damaged")
        else:
            shutil.rmtree(admission.folder)
    start, answers = _CONTEXT.Barrier(_PROCESSES), _CONTEXT.Queue()
    arguments = (cache.folder, tmp_path, start, answers)
    processes = [_CONTEXT.Process(target=admit_at_once, args=arguments) for _ in range(_PROCESSES)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in range(_PROCESSES * _ROUNDS)]
    for process in processes:
        process.join(60)
    assert [answer for answer in found if answer[1:] != (keys[answer[0]], True)] == []
    left = {path.name for path in (store.root / "published").iterdir()}
    assert left == set(keys.values())
    assert all(store.find(str(key)) is not None for key in keys.values())


@pytest.mark.parametrize("call", ["write", "rename"])
def test_a_killed_gate_leaves_no_half_folder(call: str, cache: ProjectorCache, tmp_path: Path) -> None:
    Draft().write(tmp_path / "adapter")
    process = _CONTEXT.Process(target=die_at, args=(call, cache.folder, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    store = PublishedStore(tmp_path / "store")
    (leftover,) = (store.root / "published").iterdir()
    assert leftover.name.startswith(".new-")

    admission = admit(tmp_path / "adapter", "tenant", GateSettings(cache, Policy(method="safe-lora")), store)
    assert admission.report.accepted and not admission.cached and admission.folder is not None
    clean(store.root)
    assert leftover.exists()  # young: it may belong to a live process
    old = time.time() - 7200
    for path in (leftover, *leftover.iterdir()):
        os.utime(path, (old, old))
    clean(store.root)
    assert list((store.root / "published").iterdir()) == [admission.folder]


def test_leftovers_that_go_away_while_they_are_looked_at(store: PublishedStore) -> None:
    published = store.root / "published"
    published.mkdir(parents=True)
    (published / ".new-gone").symlink_to("nowhere")  # listed, but nothing to ask for its age
    clean(store.root)


def test_another_process_publishes_while_a_damaged_copy_is_being_replaced(
    cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, store = GateSettings(cache, Policy(method="safe-lora")), PublishedStore(tmp_path / "store")
    folder = admit(Draft().write(tmp_path / "adapter"), "tenant", settings, store).folder
    assert folder is not None
    sound = tmp_path / "sound"
    shutil.copytree(folder, sound)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    rename = Path.rename

    def racing(path: Path, target: Path) -> Path:
        result = rename(path, target)
        if path == folder:  # our damaged copy was moved away: somebody else is quicker
            shutil.copytree(sound, folder)
        return result

    monkeypatch.setattr(Path, "rename", racing)
    admission = admit(tmp_path / "adapter", "tenant", settings, store)
    assert admission.report.accepted and admission.key is not None
    assert store.find(admission.key) is not None
