"""``python -m tests.base_install MODULE [ARGUMENT …]`` runs a module as if no extras were installed."""

from __future__ import annotations

import runpy
import sys
from typing import Any

SERVER_ONLY = ("vllm", "fastapi", "starlette", "pydantic", "uvicorn", "python_multipart", "watchfiles")


class Absent:
    """Finds no module of `SERVER_ONLY`."""

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> None:
        if name.partition(".")[0] in SERVER_ONLY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    assert not set(SERVER_ONLY) & set(sys.modules)
