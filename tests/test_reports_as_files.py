"""`inspect --html` and `--png`: one file, nothing asked of the network, names as text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import sys
from pathlib import Path

import pytest

from safelora_vllm.cli.main import main
from safelora_vllm.errors import Reason, UsageError
from safelora_vllm.page.export import write_html
from safelora_vllm.page.files import page_files
from safelora_vllm.page.picture import arranged, write_png
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import ModuleReport, Report
from tests.tiny import Draft, lora_config

HOSTILE = "</script><script>window.hurt=1</script>"
NAMES = [f"model.layers.{i}.{part}" for i in (10, 2) for part in ("mlp.up_proj", "self_attn.q_proj")]


def report(name: str = HOSTILE, accepted: bool = True) -> Report:
    modules = [ModuleReport(n, 4, 0.5, 0.2, 0.3, 0.01, "projected") for n in [*NAMES, HOSTILE]]
    modules[0] = ModuleReport(NAMES[0], 4, None, 0.2, None, 0.0, "kept")
    reasons = [] if accepted else [Reason("total_norm", HOSTILE)]
    return Report(name, "d" * 64, "p" * 64, Policy(), accepted, reasons, modules, 0.02)


def test_the_file_has_all_that_it_needs(tmp_path: Path) -> None:
    write_html(report(), tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert text.count("<script") == 2 and text.count("</script>") == 2, "no name ends the data"
    data = re.search(r'id="report">(.*?)</script>', text, re.S)
    assert data and json.loads(data[1]) == report().to_dict()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy
    for tag in ('<script type="module">(.*?)</script>', "<style>(.*?)</style>"):
        body = re.search(tag, text, re.S)
        assert body
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in html.unescape(policy[1])
    assert not re.search(r"^(import|export) ", text, re.M)
    assert not re.search(r"""(src|href)=|https?://|url\(""", text)


def test_no_file_of_the_page_makes_markup_of_text() -> None:
    assert {"index.html", "page.css", "main.js"} <= set(page_files())
    for name, file in page_files().items():
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|localStorage|https?://",
            file.content.decode(),
        )
        assert not found or name == "icon.svg", (name, found)


def test_what_the_command_writes(
    cache: ProjectorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install '.[picture]'")
    good = Draft().write(tmp_path / "good")
    bad = Draft(lora_config(use_dora=True)).write(tmp_path / "bad")
    given = ["--projectors", str(cache.folder), "--html", str(tmp_path / "x.html")]
    picture = ["--png", str(tmp_path / "x.png")]
    assert main(["inspect", str(good), *given, *picture]) == 0
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["inspect", str(bad), *given]) == 3 and "use_dora" in (tmp_path / "x.html").read_text()
    assert main(["inspect", str(bad), *given, *picture]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    assert main(["inspect", str(good), str(bad), *given]) == 2
    assert "--html and --png show one adapter" in capsys.readouterr().err
    assert main(["inspect", str(good), *given[:2], "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_a_picture_of_names_that_matplotlib_would_read(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install '.[picture]'")
    write_png(report("$\\frac{1}$ \u202e\n", accepted=False), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        UsageError, match=r"needs matplotlib: pip install '\.\[picture\]' in the checkout, or use --html"
    ):
        write_png(report(), tmp_path / "x.png")


def test_layers_are_sorted_as_numbers() -> None:
    layers, columns, cells = arranged(report().modules)
    assert layers == ["2", "10", "–"] and columns[:2] == ["q_proj", "up_proj"]
    assert cells[1][1] is not None and cells[1][1].name == NAMES[0] and cells[0][2] is None
