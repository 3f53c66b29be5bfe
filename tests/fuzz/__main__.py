"""Fuzz long, guided by coverage: ``python -m tests.fuzz [TARGET…] [--runs N] [--out FILE]`` (needs atheris).

Each target runs in a process of its own under libFuzzer, from its seeds and what was found before. The
report has the executions, the slowest one and the peak memory of each. A finding ends the target and is
written to ``tests/fuzz/findings/TARGET/``, where the tests replay it once it is mended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

FINDINGS = Path(__file__).with_name("findings")
_NAMES = ("header", "body", "adapter", "config", "archive", "multipart", "manifest", "name", "record")
_SECONDS = 10  # one execution that takes longer is a finding
_MEMORY_MB = 2048
_IN_PROCESS = "--in-process"  # TARGET and libFuzzer's options
_COLUMNS = ("executions", "corpus", "slowest_seconds", "peak_mb", "findings")


def main() -> int:
    """Exit code 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*", default=_NAMES, help=f"of {', '.join(_NAMES)}")
    parser.add_argument("--runs", type=int, default=120_000, help="executions of each target")
    parser.add_argument("--out", type=Path, help="write the report here, JSON")
    args = parser.parse_args()
    results = {}
    for target in args.targets:
        print(f"{target}: {args.runs:,} executions", file=sys.stderr)
        results[target] = run(target, args.runs)
    report = {
        "command": f"python -m tests.fuzz --runs {args.runs}",
        "versions": {name: version(name) for name in ("atheris", "safelora-vllm", "safetensors", "torch")},
        "executions": sum(result["executions"] for result in results.values()),
        "targets": results,
    }
    table = Table("target", *_COLUMNS, title=f"{report['executions']:,} executions")
    for target, result in results.items():
        table.add_row(target, *(f"{result[column]:,}" for column in _COLUMNS))
    Console().print(table)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(result["findings"] for result in results.values()))


def fuzz(target: str, options: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["safelora_vllm", "zipfile", "tarfile", "python_multipart"]):
        from tests.fuzz import targets
    function = targets.TARGETS[target]
    function(targets.seeds(target)[0])  # what is made once is not this target's time or memory
    atheris.Setup([sys.argv[0], *options], function)
    atheris.Fuzz()


def run(target: str, runs: int) -> dict[str, float]:
    """One target in a process of its own; libFuzzer's statistics of it."""
    from tests.fuzz import targets

    with tempfile.TemporaryDirectory() as folder:
        corpus, found = Path(folder) / "corpus", Path(folder) / "found"
        corpus.mkdir(), found.mkdir()
        for seed in targets.seeds(target):
            (corpus / hashlib.sha256(seed).hexdigest()).write_bytes(seed)
        options = [f"-runs={runs}", f"-timeout={_SECONDS}", f"-rss_limit_mb={_MEMORY_MB}", "-max_len=8192"]
        options += [
            f"-artifact_prefix={found}/",
            "-print_final_stats=1",
            "-seed=1",
            "-use_value_profile=1",
            str(corpus),
        ]
        command = [sys.executable, "-m", "tests.fuzz", _IN_PROCESS, target, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stdout))
        if not stats or done.returncode:
            print(done.stdout[-6000:], file=sys.stderr)
        for file in found.iterdir():
            (FINDINGS / target).mkdir(parents=True, exist_ok=True)
            (FINDINGS / target / file.name).write_bytes(file.read_bytes())
        return {
            "executions": int(stats.get("number_of_executed_units", 0)),
            "corpus": len(list(corpus.iterdir())),
            "slowest_seconds": int(stats.get("slowest_unit_time_sec", 0)),
            "peak_mb": int(stats.get("peak_rss_mb", 0)),
            "findings": len(list(found.iterdir())) or int(done.returncode != 0),
        }


if __name__ == "__main__":
    if sys.argv[1:2] == [_IN_PROCESS]:
        fuzz(sys.argv[2], sys.argv[3:])
    sys.exit(main())
