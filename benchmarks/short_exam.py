"""Options of a guarded server whose exams are as short as they can be.

Everything that has a finite score passes: what is measured is the server, not the exam's verdicts.
"""

from __future__ import annotations

import json
from pathlib import Path

from safelora_vllm.exam.probes import drawn

_PROBES = 8  # the fewest


def short_exam(folder: Path) -> tuple[str, ...]:
    """The options, with a file of probes in a folder that is there.

    In float32, as exams compute, and CPUs without AVX-512 do that several times as fast in it.
    """
    file = folder / "probes.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in drawn(b"", _PROBES).prompts))
    return ("--exam=enforce", "--exam-threshold=1000", f"--exam-probes={file}", "--dtype=float32")
