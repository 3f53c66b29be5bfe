"""Fuzzing of everything that reads what a tenant sends: `targets`, run long by ``python -m tests.fuzz``.

The same targets run for some seconds in ``tests/test_fuzz.py``, which also replays ``findings/``.
"""
