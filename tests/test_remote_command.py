"""`inspect` and `project` of an address, with the user's own credentials."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save, save_file

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.api import build_projectors
from safelora_vllm.cli.main import main
from safelora_vllm.errors import UsageError
from safelora_vllm.projectors import build
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import ModelName
from safelora_vllm.projectors.partial_cache import hidden_folder
from safelora_vllm.remote import clouds, fetch, model, pinned
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


def put_pair(upload: Upload, pair: Pair) -> list[str]:
    """Both models into the bucket; the arguments of `build`, without its output."""
    for side, folder in (("base", pair.base), ("aligned", pair.aligned)):
        for name in ("config.json", "model.safetensors"):
            upload(f"pair/{side}/{name}", (folder / name).read_bytes())
    return ["build", "--base", "s3://bucket/pair/base", "--aligned", "s3://bucket/pair/aligned", "--out"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Of each request for an object: its path, the first byte asked for, and the status."""
    found: list[tuple[str, int, int]] = []
    get = pinned.get

    @contextmanager
    def noted(url: str, headers: dict[str, str], *rest: Any) -> Iterator[pinned.Answer]:
        with get(url, headers, *rest) as answer:
            path = "/".join(url.partition("?")[0].split("/")[-2:])
            start = int(headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            found.append((path, start, answer.status))
            yield answer

    monkeypatch.setattr(fetch.pinned, "get", noted)
    return found


class Cut(KeyboardInterrupt):
    """Ctrl-C at a chosen moment."""


@contextmanager
def cut_after(monkeypatch: pytest.MonkeyPatch, keeps: int) -> Iterator[None]:
    """The download notes its state every 10,000 bytes, and is interrupted after some of these notes."""
    left, real = iter(range(keeps)), model.replace_file

    def write(path: Path, data: bytes) -> None:
        real(path, data)
        if next(left, None) is None:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_KEEP_BYTES", 10_000)
        patch.setattr(pinned, "_BLOCK", 4096)
        patch.setattr(model, "replace_file", write)
        yield


def hidden(folder: Path) -> list[str]:
    return sorted(path.name[: len(".out.models-")] for path in folder.iterdir() if path.name[0] == ".")


def test_an_interrupted_download_goes_on(
    upload: Upload, pair: Pair, tmp_path: Path, asked: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, given = tmp_path / "out", put_pair(upload, pair)
    with cut_after(monkeypatch, 3), pytest.raises(Cut):
        main([*given, str(out)])
    assert hidden(tmp_path) == [".out.models-"] and "repeat the build to go on" in capsys.readouterr().err
    asked.clear()
    assert main([*given, str(out)]) == 0
    status = {path: (start, status) for path, start, status in asked}
    assert status["base/config.json"] == (0, 304)
    start, partial = status["base/model.safetensors"]
    assert start > 10_000 and partial == 206
    assert status["aligned/model.safetensors"] == (0, 200)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    main(
        ["build", "--base", str(pair.base), "--aligned", str(pair.aligned), "--out", str(tmp_path / "local")]
    )
    assert ProjectorCache(out).id == ProjectorCache(tmp_path / "local").id


@pytest.mark.parametrize("change", ["object", "note", "file"])
def test_what_changed_meanwhile_is_downloaded_again(
    change: str, upload: Upload, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "out", put_pair(upload, pair)
    with cut_after(monkeypatch, 3), pytest.raises(Cut):
        main([*given, str(out)])
    (folder,) = tmp_path.glob(".out.models-*/base")
    new = load_file(pair.base / "model.safetensors")
    if change == "object":
        new = {name: 2 * tensor for name, tensor in new.items()}
        upload("pair/base/model.safetensors", save(new))
    elif change == "note":
        (folder / ".seen" / "model.safetensors").write_text('{"etag": ')
    else:
        os.truncate(folder / "model.safetensors", 5000)
    assert main([*given, str(out)]) == 0
    (tmp_path / "new").mkdir()
    shutil.copy(pair.base / "config.json", tmp_path / "new")
    save_file(new, tmp_path / "new" / "model.safetensors")
    local = build.build(tmp_path / "new", pair.aligned, tmp_path / "local")
    assert ProjectorCache(out).id == ProjectorCache(local).id
    assert hidden(tmp_path) == []


_KILLED = """
import os, signal, sys
from safelora_vllm.api import build_projectors
from safelora_vllm.cli.main import main
from safelora_vllm.errors import UsageError
from safelora_vllm.projectors import build
from safelora_vllm.projectors import build
from safelora_vllm.projectors.partial_cache import PartialCache
build._SHARD_BYTES = 30_000
add = PartialCache.add
def killed(self, *arguments):
    add(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
PartialCache.add = killed
main(sys.argv[1:])
"""


def test_a_killed_build_of_downloaded_models_goes_on(
    upload: Upload, pair: Pair, tmp_path: Path, asked: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, given = tmp_path / "out", put_pair(upload, pair)
    killed = subprocess.run([sys.executable, "-c", _KILLED, *given, str(out)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == [
        ".out.models",
        ".out.partial",
    ]
    monkeypatch.setattr(build, "_SHARD_BYTES", 30_000)
    assert main([*given, str(out)]) == 0
    assert "modules are finished" in capsys.readouterr().err, "the computed part is taken over"
    assert {status for path, _, status in asked if not path.endswith("index.json")} == {304}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_downloads_stay_only_where_a_build_can_go_on(
    upload: Upload, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = tmp_path / "out", put_pair(upload, pair)
    same = [*given[:3], "--aligned", "s3://bucket/pair/base", "--out"]
    assert main([*same, str(out)]) == 2 and "identical" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing can be built of them"
    none = [*given[:3], "--aligned", "s3://bucket/none", "--out"]
    assert main([*none, str(out)]) == 2
    told = capsys.readouterr().err
    assert "s3://bucket/none/config.json is not there" in told and "repeat the build" in told
    assert len(hidden(tmp_path)) == 1, "the base is downloaded"
    with pytest.raises(UsageError, match="another build"), hidden_folder(out, "models", "0" * 64):
        build_projectors(given[2], given[4], out)
    assert main([*given, str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "others of the same place are removed"


def test_what_is_not_there(source: str, cache: ProjectorCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{source}/nothing", "--projectors", str(cache.folder)]) == 3
    assert "[source_not_found]" in capsys.readouterr().err
