"""Every fuzz target for some seconds, and all that fuzzing ever found. ``python -m tests.fuzz`` runs long."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, seeds

FINDINGS = sorted((Path(__file__).parent / "fuzz" / "findings").glob("*/*"))


@pytest.mark.parametrize("target", TARGETS)
def test_no_promise_breaks(target: str) -> None:
    sound = seeds(target)

    @settings(max_examples=300)
    @given(st.one_of(st.binary(max_size=2048), st.integers(0, 2**32).map(lambda seed: mutated(sound, seed))))
    @example(b"")
    def check(data: bytes) -> None:
        TARGETS[target](data)

    for data in sound:
        TARGETS[target](data)
    check()


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: f"{path.parent.name}-{path.name[:20]}")
def test_what_was_found_is_mended(finding: Path) -> None:
    TARGETS[finding.parent.name](finding.read_bytes())


def mutated(sound: list[bytes], seed: int) -> bytes:
    """A sound input with a few bytes changed, removed, doubled or put elsewhere."""
    random = Random(seed)
    data = bytearray(random.choice(sound))
    for _ in range(random.randint(1, 8)):
        start = random.randrange(len(data) + 1)
        end = start + random.choice([1, 1, 2, 4, 16, 64])
        match random.randrange(4):
            case 0:
                data[start:end] = random.randbytes(end - start)
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = data[start:end]
            case 3:
                data[start : start + 1] = random.choice(b'\0\xff"{}[]:,019-.e/').to_bytes()
    return bytes(data)
