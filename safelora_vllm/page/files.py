"""The files of the page, read once from this package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

INDEX = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent. tag: its ETag."""

    content: bytes
    media_type: str
    tag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Name → file."""
    found = {}
    for path in (resources.files(__package__) / "static").iterdir():
        suffix = "." + path.name.rpartition(".")[2]
        if suffix in _MEDIA_TYPES:
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.name] = PageFile(content, _MEDIA_TYPES[suffix], tag)
    return found


def text_of(name: str) -> str:
    """The text of a file of the page."""
    return page_files()[name].content.decode()
