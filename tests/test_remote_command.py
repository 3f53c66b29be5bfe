"""`inspect` and `project` of an address, with the user's own credentials."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.cli.main import main
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import ModelName
from safelora_vllm.remote import clouds
from tests.moto_server import CREDENTIALS, s3
from tests.tiny import Draft, Pair, lora

Upload = Callable[[str, bytes], None]


@pytest.fixture
def upload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upload]:
    """Puts an object into the bucket, for which this process has credentials."""
    with s3() as (endpoint, client):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        clouds._store.cache_clear()
        yield lambda key, content: client.put_object(Bucket="bucket", Key=key, Body=content)
        clouds._store.cache_clear()


@pytest.fixture
def source(upload: Upload, tmp_path: Path) -> str:
    folder = Draft(tensors=lora(seed=1)).write(tmp_path / "adapter")
    for name in (CONFIG, WEIGHTS):
        upload(f"x/{name}", (folder / name).read_bytes())
    return "s3://bucket/x"


def test_inspect_and_project(
    source: str, cache: ProjectorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = ["--projectors", str(cache.folder), "--method", "safe-lora"]
    assert main(["inspect", source, "--json", *given]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["adapter"], report["accepted"]) == (source, True)
    assert main(["project", source, "--out", str(tmp_path / "out"), *given]) == 0
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_build(upload: Upload, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both models from a bucket, one of them in shards. The cache is the one that their folders give."""
    upload("base/config.json", (pair.base / "config.json").read_bytes())
    upload("base/model.safetensors", (pair.base / "model.safetensors").read_bytes())
    upload("aligned/config.json", (pair.aligned / "config.json").read_bytes())
    tensors = load_file(pair.aligned / "model.safetensors")
    shards = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shards.values()):
        upload(f"aligned/{shard}", save({n: t for n, t in tensors.items() if shards[n] == shard}))
    upload("aligned/model.safetensors.index.json", json.dumps({"weight_map": shards}).encode())
    remote, local = tmp_path / "remote", tmp_path / "local"
    given = ["--base", "s3://bucket/base", "--aligned", "s3://bucket/aligned", "--out"]
    assert main(["build", *given, str(remote)]) == 0
    assert main(["build", "--base", str(pair.base), "--aligned", str(pair.aligned), "--out", str(local)]) == 0
    assert ProjectorCache(remote).id == ProjectorCache(local).id
    assert ProjectorCache(remote).aligned_model == ModelName("s3://bucket/aligned")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "remote"]
    capsys.readouterr()
    assert main(["build", *given, str(remote)]) == 2 and "exists" in capsys.readouterr().err
    given[1] = "s3://bucket/none"
    assert main(["build", *given, str(tmp_path / "new")]) == 2
    told = capsys.readouterr().err
    assert "the model cannot be downloaded: s3://bucket/none/config.json is not there" in told
    given[1] = "s3://bucket/model.tar"
    assert main(["build", *given, str(tmp_path / "new")]) == 2
    assert "s3://bucket/model.tar is not the address of a model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_not_there(source: str, cache: ProjectorCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{source}/nothing", "--projectors", str(cache.folder)]) == 3
    assert "[source_not_found]" in capsys.readouterr().err
