"""`inspect` and `project` of an address, with the user's own credentials."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.cli.main import main
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.remote import clouds
from tests.moto_server import CREDENTIALS, s3
from tests.tiny import Draft, lora


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = Draft(tensors=lora(seed=1)).write(tmp_path / "adapter")
    with s3() as (endpoint, client):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        for name in (CONFIG, WEIGHTS):
            client.put_object(Bucket="bucket", Key=f"x/{name}", Body=(folder / name).read_bytes())
        clouds._store.cache_clear()
        yield "s3://bucket/x"
        clouds._store.cache_clear()


def test_inspect_and_project(
    source: str, cache: ProjectorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = ["--projectors", str(cache.folder), "--method", "safe-lora"]
    assert main(["inspect", source, "--json", *given]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["adapter"], report["accepted"]) == (source, True)
    assert main(["project", source, "--out", str(tmp_path / "out"), *given]) == 0
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_what_is_not_there(source: str, cache: ProjectorCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{source}/nothing", "--projectors", str(cache.folder)]) == 3
    assert "[source_not_found]" in capsys.readouterr().err
