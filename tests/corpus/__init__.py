"""Hostile adapters, generated: every row of the attack table in several variants, with the answer to each.

The same cases run against the gate (`tests/test_corpus.py`), against a live guarded server
(`tests/server/test_corpus_live.py`) and against unguarded vLLM (`benchmarks/hostile.py`).
"""

from tests.corpus import archives, config, files, modules, names, scaling, tensors
from tests.corpus.case import NAME, ROWS, TAKEN, Hostile
from tests.corpus.target import Target

CORPUS: list[Hostile] = [
    case for theme in (modules, config, scaling, tensors, files, names, archives) for case in theme.CASES
]

__all__ = ["CORPUS", "NAME", "ROWS", "TAKEN", "Hostile", "Target"]
