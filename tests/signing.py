"""Signatures as model-signing makes them, and as nobody should."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from safelora_vllm.signatures.rule import SigningRule

KIND = "application/vnd.in-toto+json"
Key = ec.EllipticCurvePrivateKey


def new_key(curve: ec.EllipticCurve | None = None) -> Key:
    """A key, by default of the one curve that is accepted."""
    return ec.generate_private_key(curve or ec.SECP256R1())


def public_pem(key: Any) -> str:
    """The public half of any kind of key."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()  # type: ignore[no-any-return]


def private_pem(key: Any) -> bytes:
    """The key itself."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # type: ignore[no-any-return]


def identity(pem: str) -> str:
    """A key's id, as `sha256sum` of its PEM says it."""
    return f"sha256:{hashlib.sha256(pem.encode()).hexdigest()}"


def rule(*keys: Key, required: bool = True) -> SigningRule:
    """Of a tenant that has these keys."""
    pems = map(public_pem, keys)
    return SigningRule({identity(pem): pem for pem in pems}, required)


def statement(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What model-signing states of some files."""
    digests = {name: hashlib.sha256(files[name]) for name in sorted(files)}
    whole = hashlib.sha256(b"".join(digest.digest() for digest in digests.values())).hexdigest()
    resources = [
        {"name": name, "algorithm": "sha256", "digest": digest.hexdigest()}
        for name, digest in digests.items()
    ]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "adapter", "digest": {"sha256": whole}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files", "hash_type": "sha256", "allow_symlinks": False,
                "ignore_paths": [".gitattributes", ".gitignore", "model.sig", ".git", ".github"],
            },
            "resources": resources,
        },
    }  # fmt: skip


def encoded(kind: bytes, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, from its specification."""
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])


def bundle(payload: bytes, key: Key, *, kind: str = KIND, signed_as: str = KIND) -> dict[str, Any]:
    """A payload in a bundle. signed_as: the type that the signature is of."""
    signature = key.sign(encoded(signed_as.encode(), payload), ec.ECDSA(SHA256()))
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {
            "publicKey": {"hint": identity(public_pem(key)).removeprefix("sha256:")}, "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }  # fmt: skip


def signed(files: Mapping[str, bytes], key: Key) -> bytes:
    """The content of ``model.sig`` for some files."""
    return json.dumps(bundle(json.dumps(statement(files)).encode(), key)).encode()


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder but its signature."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "model.sig")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def sign_folder(folder: Path, key: Key) -> Path:
    """Put a signature of all files into a folder."""
    (folder / "model.sig").write_bytes(signed(files_of(folder), key))
    return folder
