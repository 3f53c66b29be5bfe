"""What the worst adapters cost the gate: peak memory and processor time, against their size.

    python benchmarks/vetting.py [--projectors DIR] [--ranks 32 128 512]

Each case passes the whole gate (read, vet, project, publish, keep) in a process of its own, with one thread.
Memory is the rise of the peak over what the process held before. Time is processor time, divided by what
hashing the unpacked weights with sha256 takes in the same process.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, Limits
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore, RawStore

_CACHE = Path(__file__).resolve().parent.parent / ".cache"
_MB = 2**20


def main() -> None:
    """Run every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--projectors", type=Path, default=_CACHE / "projectors")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache, rows = ProjectorCache(args.projectors), []
    for name, make in cases(args.ranks).items():
        with tempfile.TemporaryDirectory() as scratch:
            path = make(Path(scratch) / "adapter", cache)
            command = [sys.executable, "-c", _JUDGE, str(path), str(args.projectors), scratch]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent
            )
            rows.append({"case": name, **json.loads(done.stdout)})
            print(rows[-1], file=sys.stderr)
    table = Table("case", "uploaded MB", "weights MB", "peak MB", "peak / weights", "time / sha256", "answer")
    for row in rows:
        sizes = (f"{row[key] / _MB:,.1f}" for key in ("uploaded", "weights", "peak"))
        ratios = (f"{row['peak'] / row['weights']:.1f}", f"{row['seconds'] / row['sha256_seconds']:.1f}")
        table.add_row(row["case"], *sizes, *ratios, row["answer"])
    Console().print(table)
    command_line = f"vetting.py --ranks {' '.join(map(str, args.ranks))}"
    print(f"written to {recording.write('vetting', command_line, 1, {'cases': rows}, args.out)}")


_JUDGE = "import sys, vetting; vetting.judge(*sys.argv[1:])"


def judge(path: str, projectors: str, scratch: str) -> None:
    """One case, in this process; prints one line of JSON."""
    torch.set_num_threads(1)
    cache = ProjectorCache(projectors)
    cache.load("cpu")
    settings = GateSettings(
        cache, Policy(method="safe-lora", select="all"), dtype=torch.bfloat16, limits=Limits()
    )
    stores = PublishedStore(scratch), RawStore(scratch)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = _status("VmRSS"), time.process_time()
    admission = admit(path, "worst", settings, *stores)
    seconds, peak = time.process_time() - start, _status("VmHWM") - before
    weights = max(admission.nbytes, _size(Path(path)))
    start = time.process_time()
    hashlib.sha256(bytes(weights)).hexdigest()
    reasons = ", ".join(dict.fromkeys(reason.code for reason in admission.report.reasons))
    figures = {
        "uploaded": _size(Path(path)), "weights": weights, "peak": peak,
        "seconds": seconds, "sha256_seconds": time.process_time() - start, "answer": reasons or "accepted",
    }  # fmt: skip
    print(json.dumps(figures))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def cases(ranks: list[int]) -> dict[str, Callable[[Path, ProjectorCache], Path]]:
    """Name → what writes the case."""
    found: dict[str, Callable[[Path, ProjectorCache], Path]] = {}
    for rank in ranks:
        found[f"r = {rank}, float32"] = lambda p, c, r=rank: _adapter(p, c, r, torch.float32)
        found[f"r = {rank}, bfloat16"] = lambda p, c, r=rank: _adapter(p, c, r, torch.bfloat16)
    found[f"r = {ranks[-1]}, zeros in .tar.gz"] = lambda p, c: _bomb(p, c, ranks[-1])
    found["header of 8 MB"] = _long_header
    found["4,096 patterns"] = _long_config
    return found


def _adapter(folder: Path, cache: ProjectorCache, rank: int, dtype: torch.dtype, values: bool = True) -> Path:
    torch.manual_seed(0)
    tensors = {}
    for name, entry in cache.modules.items():
        d_out, d_in = entry.shape
        a, b = (
            torch.randn(rank, d_in),
            torch.randn(d_out, rank) * 0.01 * entry.aligned_norm / (rank * d_out * d_in) ** 0.5,
        )
        tensors[f"base_model.model.{name}.lora_A.weight"] = (a if values else torch.zeros_like(a)).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (b if values else torch.zeros_like(b)).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(_config(rank)))
    return folder


def _config(rank: int, **more: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], **more}


def _bomb(path: Path, cache: ProjectorCache, rank: int) -> Path:
    """Zeros, which gzip packs a thousandfold."""
    folder = _adapter(path, cache, rank, torch.float32, values=False)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as packed:
        for name in (CONFIG, WEIGHTS):
            packed.add(folder / name, name)
    archive = path.with_suffix(".tar.gz")
    archive.write_bytes(gzip.compress(buffer.getvalue(), 1))
    return archive


def _long_header(folder: Path, _cache: ProjectorCache) -> Path:
    """As many tensors as 8 MB can name."""
    folder.mkdir()
    line = '"{:0>450}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    text = ("{" + ",".join(map(line.format, range(16_000))) + "}").encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / CONFIG).write_text(json.dumps(_config(8)))
    return folder


def _long_config(folder: Path, cache: ProjectorCache) -> Path:
    """Patterns that no module matches, each to be compared with every module."""
    _adapter(folder, cache, 8, torch.float32)
    patterns = {f"{'x' * 100}.{number:0>100}": 8 for number in range(4_096)}
    (folder / CONFIG).write_text(json.dumps(_config(8, rank_pattern=patterns)))
    return folder


if __name__ == "__main__":
    main()
