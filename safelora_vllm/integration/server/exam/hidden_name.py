"""The name of what is examined: no caller can give it, and none is shown it."""

from __future__ import annotations

import secrets

# With spaces, which no adapter's name has.
HIDDEN = "safelora exam "
# One for each process, and no more: vLLM keeps a series of its metrics for each set of names.
HIDDEN_NAME = HIDDEN + secrets.token_hex(16)


def without_hidden(exposition: str) -> str:
    """vLLM's metrics without the samples that name what is examined."""
    if HIDDEN not in exposition:
        return exposition
    return "".join(line for line in exposition.splitlines(keepends=True) if HIDDEN not in line)
