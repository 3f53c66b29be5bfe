"""What is fuzzed: functions that take any bytes, and raise where a promise is broken.

The promises: no errors but the documented ones; what is accepted says the same to the library that reads it
next; what is projected is finite and below the cap.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import safetensors
from safetensors import SafetensorError
from starlette.requests import Request

from safelora_vllm.adapters.archive import read_archive
from safelora_vllm.adapters.beside import SIGNATURE
from safelora_vllm.adapters.config import parse_config
from safelora_vllm.adapters.read import CONFIG, WEIGHTS, Limits, RawAdapter
from safelora_vllm.errors import AdapterRefused, ProjectorCacheError, UsageError
from safelora_vllm.gate.admit import GateSettings, evaluate
from safelora_vllm.integration.server.uploads import ARCHIVE, TooLarge, receive
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import build
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.manifest import MANIFEST
from safelora_vllm.safetensors_header import DTYPE_BYTES, plain_json, read_header
from safelora_vllm.signatures import model_signing
from safelora_vllm.signatures.keys import key_id, public_key
from safelora_vllm.signatures.model_signing import signed_files
from safelora_vllm.store.name_record import file_of, from_json, to_json
from safelora_vllm.tenants.principal import check_name
from tests.tiny import Q0, Draft, lora, lora_config, write_pair

LIMITS = Limits(config_bytes=65536, weights_bytes=65536, header_bytes=65536)
_WANTED = {CONFIG: LIMITS.config_bytes, WEIGHTS: LIMITS.weights_bytes}
_ALLOWED = 1024 * 1024
_BOUNDARY = b"b"
_SIGNED = Path(__file__).parents[1] / "signed"
_RECORD = "acme%2Fchat.json"


@cache
def scratch() -> Path:
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="safelora-fuzz-", dir=memory if memory.is_dir() else None))


@cache
def gate() -> GateSettings:
    """A gate that projects every module of the tiny model."""
    pair = write_pair(scratch() / "pair")
    build(pair.base, pair.aligned, scratch() / "cache")
    return GateSettings(
        ProjectorCache(scratch() / "cache"), Policy(method="safe-lora", select="all"), limits=LIMITS
    )


@cache
def seed_adapter() -> tuple[bytes, bytes]:
    """The config and the weights of a sound adapter on one module."""
    folder = Draft(lora_config(r=2), lora([Q0], rank=2)).write(scratch() / "adapter")
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


def header(data: bytes) -> None:
    """The header of a safetensors file: what is accepted means the same to the safetensors library."""
    with contextlib.suppress(AdapterRefused, SafetensorError):
        _, found = read_header(io.BytesIO(data), len(data), LIMITS.header_bytes)
        if all(line.dtype in DTYPE_BYTES for line in found.values()):
            theirs = {name: (t["dtype"], tuple(t["shape"])) for name, t in safetensors.deserialize(data)}
            assert theirs == {name: (line.dtype, line.shape) for name, line in found.items()}


def body(data: bytes) -> None:
    """The values of a sound file."""
    config, weights = seed_adapter()
    length = 8 + int.from_bytes(weights[:8], "little")
    values = (data or b"\0") * math.ceil((len(weights) - length) / max(len(data), 1))
    _judge(config, weights[:length] + values[: len(weights) - length])


def adapter(data: bytes) -> None:
    """Config and weights at once, a zero byte between them."""
    config, _, weights = data.partition(b"\0")
    _judge(config, weights)


def _judge(config: bytes, weights: bytes) -> None:
    try:
        parsed = plain_json(config)
        _, lines = read_header(io.BytesIO(weights), len(weights), LIMITS.header_bytes)
    except (AdapterRefused, ValueError, RecursionError):
        return
    if not isinstance(parsed, dict):
        return
    report, served = evaluate(RawAdapter(parsed, lines, config, weights, "0" * 64), "fuzz", gate())
    assert (served is None) == bool(report.reasons)
    for a, b in (served or {}).values():
        assert a.isfinite().all() and b.isfinite().all()
    for module in report.modules if served else []:
        assert module.relative_norm <= gate().policy.max_relative_norm
        assert module.decision == "projected" or module.relative_norm == 0.0


def config(data: bytes) -> None:
    """An adapter_config.json: a meaning or reasons, never both."""
    try:
        parsed = plain_json(data)
    except (ValueError, RecursionError):
        return
    if isinstance(parsed, dict):
        meaning, reasons = parse_config(parsed)
        assert (meaning is None) == bool(reasons)
        if meaning is not None:
            scale = meaning.scale(Q0)
            assert meaning.rank(Q0) > 0 and scale >= 0 and not math.isnan(scale)


def archive(data: bytes) -> None:
    """An archive: what is accepted has the same two files for tarfile or zipfile."""
    try:
        files, _ = read_archive(data, _WANTED, _ALLOWED)
    except AdapterRefused:
        return
    theirs = _by_library(data) if files else {}  # a tar of no members is none for tarfile
    for name, content in files.items():
        assert len(content) <= _WANTED[name]
        assert theirs[name] == content


def signature(data: bytes) -> None:
    """A signature, and a statement that somebody signed: only plain paths, each with a sha256."""
    with contextlib.suppress(AdapterRefused):
        key, files = signed_files(data, signing_key())
        assert key in signing_key() and json.loads(data)["dsseEnvelope"]["signatures"]
        _check_signed(files)
    with contextlib.suppress(AdapterRefused):
        _check_signed(model_signing._files(data))


def _check_signed(files: dict[str, str]) -> None:
    for name, digest in files.items():
        assert len(bytes.fromhex(digest)) == 32
        assert Path("a", name).as_posix() == f"a/{name}" and ".." not in name.split("/")


@cache
def signing_key() -> dict[str, str]:
    """The key of the signed adapter that the tests have."""
    pem = (_SIGNED / "key.pub").read_text()
    return {key_id(public_key(pem)): pem}


def _by_library(data: bytes) -> dict[str, bytes]:
    """File name → content, as the standard library unpacks it; the last one of a name."""
    found = {}
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as zipped:
            for info in zipped.infolist():
                found[info.filename.replace("\\", "/").rpartition("/")[2]] = zipped.read(info)
        return found
    with tarfile.open(fileobj=io.BytesIO(data)) as packed:
        for member in packed:
            if (file := packed.extractfile(member) if member.isreg() else None) is not None:
                found[member.name.replace("\\", "/").rpartition("/")[2]] = file.read()
    return found


def multipart(data: bytes) -> None:
    """An upload's body, in pieces of the size that the first byte says."""
    folder = scratch() / "incoming"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    size = (data[0] if data else 0) + 1
    pieces = [data[start : start + size] for start in range(1, len(data), size)]

    async def read() -> dict[str, Any]:
        piece = pieces.pop(0) if pieces else b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    kind = b"multipart/form-data; boundary=" + _BOUNDARY
    request = Request({"type": "http", "method": "POST", "headers": [(b"content-type", kind)]}, read)
    with contextlib.suppress(UsageError, TooLarge):
        received = _loop().run_until_complete(receive(request, folder, LIMITS.weights_bytes, check_name))
        assert received.parts <= {CONFIG, WEIGHTS, ARCHIVE, SIGNATURE}
        assert {file.name for file in folder.iterdir()} == received.parts
    assert all(file.stat().st_size <= 1024 * 1024 for file in folder.iterdir())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def manifest(data: bytes) -> None:
    """A projector cache's manifest, beside shards that are what the build wrote."""
    folder = scratch() / "manifest"
    if not folder.exists():
        shutil.copytree(gate().cache.folder, folder)
    (folder / MANIFEST).write_bytes(data)
    with contextlib.suppress(ProjectorCacheError):
        opened = ProjectorCache(folder)
        opened.verify()
        opened.load("cpu")


def name(data: bytes) -> None:
    """An adapter's name: what is accepted is one file of its own in the store's folder."""
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(UsageError):
        file = file_of(text)
        assert "/" not in file and "\0" not in file and file not in (".", "..") and len(file) < 256
        assert unquote(file.removesuffix(".json")) == text
    with contextlib.suppress(UsageError):
        check_name(text)
        assert text.isascii() and text.isprintable() and ".." not in text.split("/")
        assert text == Path(text).as_posix(), "no two names are one path"


def record(data: bytes) -> None:
    """A name's record in the store."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, UsageError):
        found = from_json(data, _RECORD)
        assert from_json(to_json(found, _RECORD), _RECORD) == found


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (header, body, adapter, config, archive, signature, multipart, manifest, name, record)
}


def seeds(target: str) -> list[bytes]:
    """Sound inputs of a target, from which fuzzing starts."""
    settings, weights = seed_adapter()
    files = {CONFIG: settings, f"adapter/{WEIGHTS}": weights}
    signed = (_SIGNED / "adapter" / SIGNATURE).read_bytes()
    patterns = lora_config(
        rank_pattern={"q_proj": 2}, alpha_pattern={"^model.layers.0": 1.5}, use_rslora=True
    )
    version = {
        "version": 1, "digest": "0" * 64, "bytes": 1, "rank": 1, "created": 1.0, "by": "acme", "policy": {},
        "override": False, "underlying": {}, "reason": "", "key": "", "rules": "", "id": 1,
    }  # fmt: skip
    saved = {"format": 1, "name": "acme/chat", "current": 1, "versions": [version]}
    return {
        "header": [weights],
        "body": [weights[-768:], b"\0", b"\x7f\xc0", b"\xff\x7f\0\0"],
        "adapter": [settings + b"\0" + weights],
        "config": [settings, json.dumps(patterns).encode()],
        "archive": [_zipped(files), _tarred(files, "w"), _tarred(files, "w:gz")],
        "signature": [signed, base64.b64decode(json.loads(signed)["dsseEnvelope"]["payload"])],
        "multipart": [_form(files, size) for size in (b"\0", b"\x20", b"\xff")],
        "manifest": [(gate().cache.folder / MANIFEST).read_bytes()],
        "name": [b"acme/chat", b"model-1.0_x", "é/..%2f".encode()],
        "record": [json.dumps(saved).encode()],
    }[target]


def _zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(f"adapter/{Path(name).name}", content)
    return buffer.getvalue()


def _tarred(files: dict[str, bytes], mode: Literal["w", "w:gz"]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.PAX_FORMAT) as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"adapter/{Path(name).name}")
            member.size, member.pax_headers = len(content), {"comment": "x"}
            packed.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _form(files: dict[str, bytes], first: bytes) -> bytes:
    parts = {"name": b"acme/chat", **{Path(name).name: content for name, content in files.items()}}
    lines = [
        b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % (_BOUNDARY, name.encode(), content)
        for name, content in parts.items()
    ]
    return first + b"".join(lines) + b"--%s--\r\n" % _BOUNDARY
