"""``safelora://KEY`` or ``safelora://KEY/GENERATION``: the path of a published adapter in vLLM's requests.

The server writes it and the workers read it. A vLLM without the guard finds nothing there.
"""

from __future__ import annotations

SCHEME = "safelora://"


def published_key(path: str) -> str:
    """The key of the published copy that such a path names."""
    return path.removeprefix(SCHEME).partition("/")[0]
