"""What the gate does on a GPU: no vLLM and no network needed.

    python benchmarks/gpu/check.py [--device cuda:0] [--quick] [--section NAME]

Each section is a process of its own with a time limit, so that one that fails or hangs leaves the others.
With ``--device cpu --quick`` the code of the check itself is tried.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(1, str(HERE.parents[1]))
SECTIONS = {
    "card": 60,
    "agreement": 120,
    "projecting": 200,
    "gate_memory": 150,
    "decoding": 150,
    "building": 150,
}


def main() -> int:
    """Run the sections; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this one; may be repeated")
    parser.add_argument("--one", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="folder for the figures")
    args = parser.parse_args()
    if args.one:
        return run_one(args.one, args.device, args.quick, args.out)
    import recording
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "torch sees no GPU here, so nothing is checked; --device cpu --quick tries the check's own code"
        )
        return 0
    figures: dict[str, object] = {"quick": args.quick, "device": args.device}
    failed = []
    for name in args.section or SECTIONS:
        print(f"{name}:", flush=True)
        started = time.perf_counter()
        found = in_process(name, args.device, args.quick)
        if "failed" in found:
            failed.append(name)
            print(f"  FAILED: {found['failed']}", flush=True)
        figures[name] = found
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        recording.write("gpu_check", "gpu/check.py", 1, figures, args.out or recording.RESULTS)
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


def in_process(name: str, device: str, quick: bool) -> dict[str, object]:
    """One section's figures, or what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, str(Path(__file__)), "--one", name, "--device", device, "--out", str(out)]
        paths = [str(HERE.parents[1]), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        try:
            subprocess.run(command + ["--quick"] * quick, timeout=SECTIONS[name], check=True, env=environment)
            return dict(json.loads(out.read_text()))
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            return {"failed": f"{type(error).__name__}: {error}"[-300:]}


def run_one(name: str, device: str, quick: bool, out: Path) -> int:
    """Measure one section in this process."""
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        found = importlib.import_module(f"gpu.{name}").measure(torch.device(device), Path(scratch), quick)
    out.write_text(json.dumps(found))
    return 0 if found.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
