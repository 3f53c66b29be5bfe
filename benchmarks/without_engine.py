"""This package's whole HTTP side and a real gate process, without an engine behind: it starts in seconds.

    python benchmarks/without_engine.py --aligned DIR --projectors DIR --store DIR --port N [--exam KINDS]

For crash.py, which needs many starts. The engine is the one of the tests: it loads nothing. With ``--exam``
it answers exams by a script (scripted_exam.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import uvicorn
from scripted_exam import LADDER, THRESHOLD, Kinds, examined_engine

from safelora_vllm.gate.protocol import GateConfig
from safelora_vllm.gate.supervisor import GateProcess
from safelora_vllm.settings import ServerSettings

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.server.fake_engine import FakeEngine, our_routes


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("aligned", "projectors", "store"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--store-mirror")
    parser.add_argument("--exam", type=Path, metavar="KINDS", help="with --exam enforce; what passes")
    given = parser.parse_args()
    socket = str(Path(tempfile.mkdtemp()) / "gate.sock")
    policy = {} if given.exam else {"method": "safe-lora"}
    exam = {"exam": "enforce", "ladder": LADDER, "exam_threshold": THRESHOLD} if given.exam else {}
    settings = ServerSettings(
        str(given.projectors), str(given.store), policy, store_mirror=given.store_mirror, **exam
    )
    gate = GateProcess(GateConfig(socket, str(given.aligned), settings, dtype="bfloat16"))
    engine = FakeEngine.guarded(socket, lambda: gate.state)
    if given.exam:
        engine = examined_engine(engine, given.store, Kinds.read(given.exam))
    app = our_routes(engine, settings)
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")
    os._exit(0)


if __name__ == "__main__":
    main()
