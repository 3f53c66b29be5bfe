"""The page's view of one adapter as a file that needs no server: HTML with everything in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_vllm.errors import UsageError
from safelora_vllm.page.files import text_of

if TYPE_CHECKING:
    from safelora_vllm.report import Report

_MODULES = ("dom.js", "heatmap.js", "report.js")  # each imports only from those before it
_IMPORT = re.compile(r"^import [^;]*;\n", re.M)
_EXPORT = re.compile(r"^export (?=const|function|class|async)", re.M)
_START = 'reportPage(JSON.parse(document.getElementById("report").textContent));\n'


def write_html(report: Report, file: Path) -> None:
    """Write a report as one HTML file. It asks nothing of any server, and runs no script but the page's own.

    Raises:
        UsageError: the file cannot be written.
    """
    script = "".join(_EXPORT.sub("", _IMPORT.sub("", text_of(name))) for name in _MODULES) + _START
    style = text_of("page.css")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    # No text of the adapter can end the element that it is in.
    data = json.dumps(report.to_dict(), allow_nan=False).replace("<", "\\u003c")
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>safelora</title>
<style>{style}</style>
</head>
<body>
<main id="main"><noscript>This file needs JavaScript.</noscript></main>
<script type="application/json" id="report">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""
    _write(file, text.encode())


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}. Choose another file") from error
