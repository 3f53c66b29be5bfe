"""The gate under the default policy: CPU time of projecting and of a whole first load, operators, waits.

    python benchmarks/project_stage.py --projectors DIR [--against TREE]

Adapters go through the gate with the demo's projectors, and with one layer of Llama-2-7B's shapes that is
drawn here. ``--against``: another state of this source tree, measured in turn on the same adapters. Operators
are those that PyTorch dispatches and that compute or copy something. Reads of values are the points where the
host would wait for a device: they cost nothing on a CPU, where this runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve()
KINDS = ("qv-r8", "all-r16")
LAYERS = 32
_TIMES = ("cpu_ms", "first_load_cpu_ms")
_WAITS = ("tolist", "item", "__float__", "__bool__", "__int__")


class Count(TorchDispatchMode):
    """Counts operators that compute or copy something."""

    operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        view = func.is_view and isinstance(result, torch.Tensor)
        self.operators += not (view and _address(result) == _address(args[0]))
        return result


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class Contender:
    """A process that projects with one source tree."""

    tree: Path
    process: subprocess.Popen[str]
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def ask(self, adapter: Path, count: bool) -> dict[str, Any]:
        """The answer of `serve` for one adapter."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([str(adapter), count]), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--projectors", type=Path, help="the demo's projector cache")
    parser.add_argument("--against", type=Path, help="another source tree")
    parser.add_argument("--repeats", type=int, default=9, help="adapters of each kind")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="folder for the figures")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    import recording
    from random_projectors import LLAMA_2_7B, write_cache

    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        layer = Path(scratch) / "7b"
        write_cache(layer, LLAMA_2_7B)
        for title, projectors, scale in (("demo", args.projectors, 1), ("7B shapes", layer, LAYERS)):
            found = measure(projectors.resolve(), Path(scratch) / title, args.against, args.repeats)
            for kind, rows in found.items():
                for row in rows.values():
                    row |= {key: round(row[key] * scale, 1) for key in _TIMES}
                figures[f"{title}, {kind}"] = {"scaled_by": scale, **rows}
                for name, row in rows.items():
                    print(f"{title:10} {kind:8} {name:6}", json.dumps(row))
        figures["7B shapes, 32 layers, all-r16, groups as on a device"] = whole_model(Path(scratch))
        print("whole model", figures["7B shapes, 32 layers, all-r16, groups as on a device"])
    command = f"project_stage.py --repeats {args.repeats}" + " --against TREE" * bool(args.against)
    path = recording.write("project_stage", command, 1, {"cases": figures}, args.out or recording.RESULTS)
    print(f"written to {path}")


def measure(projectors: Path, scratch: Path, against: Path | None, repeats: int) -> dict[str, Any]:
    """Kind of adapter → contender → figures."""
    from random_adapters import write_adapters

    scratch.mkdir()
    adapters = write_adapters(scratch, projectors, repeats)
    trees = {"this": HERE.parents[1]} | ({"other": against.resolve()} if against else {})
    contenders = {name: Contender(tree, _start(tree, projectors)) for name, tree in trees.items()}
    try:
        for kind in KINDS:
            for contender in contenders.values():
                contender.ask(adapters[kind][0], False)  # warm up
                contender.counts[kind] = contender.ask(adapters[kind][0], True)
            for index, adapter in enumerate(adapters[kind][1:]):
                turn = list(contenders.values())
                for contender in turn[index % len(turn) :] + turn[: index % len(turn)]:
                    contender.answers.setdefault(kind, []).append(contender.ask(adapter, False))
    finally:
        for contender in contenders.values():
            contender.process.kill()
            contender.process.wait()
    return {
        kind: {
            name: contender.counts[kind]
            | {key: median(answer[key] for answer in contender.answers[kind]) for key in _TIMES}
            for name, contender in contenders.items()
        }
        for kind in KINDS
    }


def _start(tree: Path, projectors: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE), "--serve", str(projectors)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def serve(projectors: Path) -> None:
    """Project each adapter that a line on stdin names, and count or time the projecting step."""
    from safelora_vllm.adapters.read import Limits, read_adapter

    try:
        from safelora_vllm.gate.admit import GateSettings, Stages, admit, evaluate
    except ImportError:  # an older tree
        from safelora_vllm.gate import GateSettings, Stages, admit, evaluate  # type: ignore[attr-defined,no-redef]
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import ProjectorCache
    from safelora_vllm.store import PublishedStore, RawStore

    torch.set_num_threads(1)
    cache, policy = ProjectorCache(projectors), Policy()
    try:
        from safelora_vllm.methods.reads import parts_read

        cache.load("cpu", None, **asdict(parts_read(policy, cache.thin)))
    except ImportError:  # an older tree
        cache.load("cpu", None, policy.energy, 0.0)

    class Measured(Stages):
        """Counts or times one stage."""

        @contextlib.contextmanager
        def time(self, stage: str) -> Iterator[None]:
            with super().time(stage), counting(answer) if count and stage == "project" else nothing():
                started = time.process_time()
                yield
                if stage == "project" and not count:
                    answer["cpu_ms"] = 1e3 * (time.process_time() - started)

    for line in sys.stdin:
        adapter, count = json.loads(line)
        answer: dict[str, Any] = {}
        settings = GateSettings(cache, policy, dtype=torch.bfloat16)
        report, _ = evaluate(read_adapter(adapter, Limits()), "a", settings, Measured())
        assert report.accepted, report.reasons
        if not count:
            with tempfile.TemporaryDirectory() as store:
                started = time.process_time()
                admit(adapter, "a", settings, PublishedStore(store), RawStore(store))
                answer["first_load_cpu_ms"] = 1e3 * (time.process_time() - started)
        print(json.dumps({**answer, "modules": len(report.modules)}), flush=True)


nothing = contextlib.nullcontext


@contextlib.contextmanager
def counting(answer: dict[str, Any]) -> Iterator[None]:
    """Count what happens in the block."""
    waits, kept = [0], {name: getattr(torch.Tensor, name) for name in _WAITS}

    def counted(name: str) -> Any:
        def call(self: torch.Tensor, *args: Any) -> Any:
            waits[0] += 1
            return kept[name](self, *args)

        return call

    for name in _WAITS:
        setattr(torch.Tensor, name, counted(name))
    try:
        with Count() as mode:
            yield
    finally:
        for name, inner in kept.items():
            setattr(torch.Tensor, name, inner)
    answer |= {"operators": mode.operators, "reads_of_values": waits[0]}


def whole_model(scratch: Path) -> dict[str, int]:
    """Counts for an adapter of all linear layers of the model, r = 16, in groups as on a device."""
    from random_projectors import LLAMA_2_7B, write_cache

    from safelora_vllm.methods import judge
    from safelora_vllm.methods.reads import parts_read
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import ProjectorCache

    folder = scratch / "whole"
    write_cache(folder, LLAMA_2_7B, LAYERS, operators=False)
    cache, policy, cpu = ProjectorCache(folder), Policy(), torch.device("cpu")
    cache.load("cpu", None, **asdict(parts_read(policy, cache.thin)))
    weights = {
        name: (torch.randn(16, entry.shape[1]), torch.randn(entry.shape[0], 16))
        for name, entry in sorted(cache.modules.items())
    }
    judge._CPU_BYTES = judge._DEVICE_BYTES
    answer: dict[str, Any] = {}
    for block in (nothing(), counting(answer)):
        with torch.inference_mode(), block:
            judge.judge(weights, cache, policy, cpu, torch.bfloat16)
    groups = len(judge.grouped(weights, cache, judge._DEVICE_BYTES))
    return {"modules": len(weights), "groups": groups, "copies_between_host_and_device": 2 * groups, **answer}


if __name__ == "__main__":
    main()
