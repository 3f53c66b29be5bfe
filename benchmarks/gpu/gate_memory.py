"""The gate process on a device: its memory over its life, its stages, its answers when memory is short."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu.common import MIB, device_used, random_weights, say, write_adapter
from gpu.projecting import TINY
from random_projectors import LLAMA_2_7B, write_cache

from safelora_vllm.errors import GateUnavailable, SafeLoRAError
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateConfig
from safelora_vllm.gate.supervisor import GateProcess
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings

_STAGE = re.compile(r'safelora_stage_seconds_(sum|count)\{stage="(\w+)"\} (\S+)')


@contextmanager
def gate(device: torch.device, projectors: Path, store: Path) -> Iterator[tuple[GateClient, GateProcess]]:
    """A gate process as a worker starts it."""
    store.mkdir(mode=0o700, exist_ok=True)
    socket = store / "gate.sock"
    config = GateConfig(
        socket=str(socket),
        model="model",
        settings=ServerSettings(str(projectors), str(store / "store"), trust_served_model=True),
        device=str(device),
        dtype="bfloat16",
    )
    process = GateProcess(config)
    try:
        yield GateClient(str(socket)), process
    finally:
        process.close()


def fresh(number: int) -> dict[str, float]:
    """A policy that no adapter was judged under yet, so that a known one is judged again."""
    return {"max_total_norm": 0.9 - 1e-6 * number}


def measure(device: torch.device, scratch: Path, quick: bool) -> dict[str, Any]:
    """Bytes of the whole card over the gate's life, and seconds of its stages."""
    projectors = scratch / "projectors"
    write_cache(projectors, TINY if quick else LLAMA_2_7B, 2 if quick else 32, False, str(device))
    cache = ProjectorCache(projectors)
    adapters = [
        write_adapter(scratch / f"adapter-{seed}", random_weights(cache, 16, device, seed))
        for seed in range(3)
    ]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    quiet, found = device_used(device), {}

    def taken(when: str) -> None:
        found[f"{when}_mib"] = round((device_used(device) - quiet) / MIB)
        say({when: found[f"{when}_mib"]})

    started = time.perf_counter()
    with gate(device, projectors, scratch / "gate") as (client, process):
        found["start_s"] = round(time.perf_counter() - started, 2)
        taken("started")
        seconds = []
        for number in range(10):
            started = time.perf_counter()
            judgement = client.admit(str(adapters[number % 3]), "name", fresh(number))
            seconds.append(time.perf_counter() - started)
            assert judgement.report.accepted, judgement.report.reasons
            if number in (0, 9):
                taken(f"after_{number + 1}")
        found["first_s"], found["median_s"] = round(seconds[0], 3), round(median(seconds[1:]), 4)
        found["stages_ms"] = stages(client.metrics())
        say({key: found[key] for key in ("start_s", "first_s", "median_s", "stages_ms")})
        largest = write_adapter(scratch / "adapter-256", random_weights(cache, 64 if quick else 256, device))
        found["rank_256_accepted"] = client.admit(str(largest), "large").report.accepted
        taken("after_rank_256")
        pid = process.state.pid
        os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter()
        found["answers_after_kill_s"] = round(wait_for(client, pid) - killed, 2)
        taken("restarted")
        assert client.admit(str(adapters[0]), "name", fresh(11)).report.accepted
        taken("restarted_after_1")
        if device.type == "cuda":
            found |= short_of_memory(device, client, largest, adapters[0])
    time.sleep(1)
    taken("ended")
    return found


def stages(exposition: str) -> dict[str, float]:
    """Mean milliseconds of each stage."""
    values = {(kind, stage): float(value) for kind, stage, value in _STAGE.findall(exposition)}
    names = {stage for _, stage in values}
    return {name: round(1e3 * values["sum", name] / values["count", name], 2) for name in sorted(names)}


def wait_for(client: GateClient, old: int) -> float:
    """The time when another process than this one answers."""
    while time.sleep(0.05) is None:
        try:
            if client.state(timeout=5).pid != old:
                return time.perf_counter()
        except GateUnavailable:
            continue
    raise AssertionError


def short_of_memory(device: torch.device, client: GateClient, large: Path, small: Path) -> dict[str, Any]:
    """Almost all memory is taken by someone else: answers to a large adapter, and to the next small one."""
    found = {}
    for left_mib in (1024, 150, 0):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        pieces = max(0, free - left_mib * MIB) // (
            256 * MIB
        )  # one whole would fail where memory is in pieces
        hog = [torch.empty(256 * MIB, dtype=torch.uint8, device=device) for _ in range(pieces)]
        for name, path in (("large", large), ("small", small)):
            try:
                accepted = client.admit(str(path), name, fresh(100 + left_mib)).report.accepted
                answer = "accepted" if accepted else "refused"
            except SafeLoRAError as error:
                answer = f"{type(error).__name__}: {error}"
            found[f"{left_mib}_mib_left_{name}"] = answer[:400]
            say({f"{left_mib} MiB left, {name}": answer[:400]})
        del hog
    torch.cuda.empty_cache()
    found["afterwards"] = (
        "accepted" if client.admit(str(small), "s", fresh(99)).report.accepted else "refused"
    )
    return found
