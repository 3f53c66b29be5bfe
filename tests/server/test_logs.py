"""Lines for log pipelines: --log-format json and --audit-stdout."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import safelora_vllm
from safelora_vllm.cli import serve
from safelora_vllm.errors import UsageError
from safelora_vllm.integration import json_logs
from safelora_vllm.projectors.cache import ProjectorCache
from tests.server.conftest import TENANT_KEYS, upload, write_keys
from tests.server.fake_server import Place


def test_audit_records_are_lines_of_standard_output(
    cache: ProjectorCache, tmp_path: Path, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    with (
        Place.start(cache, tmp_path) as place,
        place.server(keys=str(write_keys(place.keys)), audit_stdout=True) as server,
    ):
        acme = server.client(TENANT_KEYS["acme"])
        acme.headers["X-Request-Id"] = "trace-7"
        assert upload(acme, "acme/x", drafts["qv"]).status_code == 201  # type: ignore[arg-type]
        acme.headers["X-Request-Id"] = "two\tlines" * 9
        assert acme.delete("/v1/adapters/acme/x").status_code == 200
        kept = place.audit()
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if "safelora.audit" in line]
    assert [(line["action"], line["adapter"]) for line in lines] == [(e[0], e[1]) for e in kept]
    first, second = lines
    assert (first["request_id"], first["tenant"], first["version"]) == ("trace-7", "acme", 1)
    assert first["decision"] == "accepted" and first["actor"] == "acme/ci" and first["time"]
    assert len(second["request_id"]) == 32, "one that is not harmless is replaced"
    assert (second["decision"], second["version"]) == ("removed", 1), "what was served until then"


# In a process of its own: logging.config closes the handlers of all others, and one of them writes to
# pytest's standard error.
LOGGED = """
import logging.config, json
from safelora_vllm.integration import json_logs

config = json.loads(json_logs.CONFIG.read_text())
(config["loggers"]["tested"],) = config["loggers"].values()
del config["loggers"]["vllm"]
logging.config.dictConfig(config)
logger = logging.getLogger("tested.part")
with json_logs.about_request("r-1", "acme"):
    logger.info("two\\nlines of %s", "text", extra={"adapter": "acme/x", "version": 3, "copy": None})
try:
    raise ValueError("x")
except ValueError:
    logger.exception("failed")
"""


def test_a_line_of_the_log() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGED], capture_output=True, text=True, check=True)
    one, two = (json.loads(line) for line in done.stdout.splitlines())
    assert one["message"] == "two\nlines of text" and (one["request_id"], one["tenant"]) == ("r-1", "acme")
    assert (one["adapter"], one["version"]) == ("acme/x", 3) and "copy" not in one
    assert not {"adapter", "version"} & two.keys()
    assert (one["level"], one["logger"]) == ("INFO", "tested.part")
    assert "ValueError: x" in two["exception"] and "request_id" not in two


def test_lines_about_an_adapter_say_which_version() -> None:
    """Each call of a logger that names an adapter gives the fields of it."""
    package = Path(safelora_vllm.__file__).parent
    found = []
    for file in (*package.glob("integration/**/*.py"), *package.glob("store/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger."):
                text = ast.unparse(node)
                if "adapter %r" in text or "%s of %r by" in text or re.search(r"name\b", text):
                    found.append((file.name, node.lineno, any(k.arg == "extra" for k in node.keywords)))
    assert len(found) >= 8 and [place for place in found if not place[2]] == []


def test_another_configuration_is_not_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(json_logs.VARIABLE, "mine.json")
    with pytest.raises(UsageError, match="names another file"):
        serve._log_json()
    monkeypatch.delenv(json_logs.VARIABLE)
    serve._log_json()
    import os

    assert os.environ[json_logs.VARIABLE] == str(json_logs.CONFIG)
