"""A loop like decoding beside a gate at work: a step reads 16 GB of weights in one CUDA graph.

The steps are timed one by one while nothing else runs, while a gate on the same card projects one adapter
after another, and while a gate on the CPU does.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from gpu.common import random_weights, say, synchronize, write_adapter
from gpu.gate_memory import fresh, gate
from gpu.projecting import TINY
from random_projectors import LLAMA_2_7B, write_cache
from recording import quantile

from safelora_vllm.gate.client import GateClient
from safelora_vllm.projectors.cache import ProjectorCache

_SIDE, _LAYERS = 8192, 120


def measure(device: torch.device, scratch: Path, quick: bool) -> dict[str, Any]:
    """Milliseconds of a step and adapters a second in each state."""
    projectors, seconds = scratch / "projectors", 1.0 if quick else 8.0
    write_cache(projectors, TINY if quick else LLAMA_2_7B, 2 if quick else 32, False, str(device))
    cache = ProjectorCache(projectors)
    adapter = write_adapter(scratch / "adapter", random_weights(cache, 16, device))
    step = decode_step(device, quick)
    found: dict[str, Any] = {"quiet": timed(device, step, seconds)}
    say(found)
    for title, where in (("gate on the device", device), ("gate on the CPU", torch.device("cpu"))):
        store = scratch / title.replace(" ", "-")
        with gate(where, projectors, store) as (client, _):
            client.admit(str(adapter), "name")
            idle = timed(device, step, seconds / 2)
            command = [sys.executable, __file__, str(store / "gate.sock"), str(adapter)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as feeder:
                assert feeder.stdout is not None
                feeder.stdout.readline()
                row = timed(device, step, seconds)
                feeder.terminate()
                done = feeder.stdout.read().splitlines()
            row |= {
                "adapters": len(done),
                "adapter_s": round(quantile(list(map(float, done)) or [0], 0.5), 4),
            }
        found[title] = {"idle": idle, "busy": row}
        say({title: found[title]})
    found["quiet_again"] = timed(device, step, seconds / 2)
    say({"quiet again": found["quiet_again"]})
    return found


def decode_step(device: torch.device, quick: bool) -> Any:
    """A function that starts one step."""
    side, layers = (256, 4) if quick else (_SIDE, _LAYERS)
    weights = [
        torch.randn(side, side, device=device, dtype=torch.bfloat16) / side**0.5 for _ in range(layers)
    ]
    x = torch.randn(8, side, device=device, dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        y = x
        for weight in weights:
            y = y @ weight
        return y

    forward()
    if device.type != "cuda":
        return forward
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    graph.weights = weights  # kept as long as the graph
    return graph.replay


def timed(device: torch.device, step: Any, seconds: float) -> dict[str, float]:
    """p50, p99 and the largest of the steps in some seconds."""
    found, end = [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        step()
        synchronize(device)
        found.append(1e3 * (time.perf_counter() - started))
    figures = {"p50": quantile(found, 0.5), "p99": quantile(found, 0.99), "max": max(found)}
    return {"steps": len(found), **{f"{key}_ms": round(value, 3) for key, value in figures.items()}}


def feed(socket: str, adapter: str) -> None:
    """Admit one adapter after another, each under a policy of its own, until told to end."""
    client, told = GateClient(socket), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    print("ready", flush=True)
    for number in range(10**6):
        if told.is_set():
            return
        started = time.perf_counter()
        client.admit(adapter, "name", fresh(number))
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    feed(*sys.argv[1:])
