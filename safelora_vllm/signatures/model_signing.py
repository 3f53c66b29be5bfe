"""A signature of OpenSSF Model Signing 1.0, made with a key: whose it is, and of which files.

A Sigstore bundle holds a DSSE envelope, and that an in-toto statement with each file's name and sha256.
All of it is a tenant's input. What it says of keys and algorithms chooses nothing: the algorithm is ECDSA on
P-256 with SHA-256, and the keys are the operator's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from safelora_vllm.adapters.beside import SIGNATURE
from safelora_vllm.errors import AdapterRefused, refuse
from safelora_vllm.safetensors_header import plain_json
from safelora_vllm.signatures.dsse import IN_TOTO, STATEMENT, is_signed
from safelora_vllm.signatures.keys import public_key
from safelora_vllm.signatures.rule import expected

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PREDICATE = "https://model_signing/signature/v1.0"
HOW = "Sign the folder with 'model_signing sign key FOLDER --private_key KEY --signature FOLDER/model.sig'"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def signed_files(bundle: bytes, keys: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The id of the key that made a signature, and file name → sha256 of what it is of.

    Args:
        bundle: the content of ``model.sig``.
        keys: public keys in PEM, by their ids.

    Raises:
        AdapterRefused: it is no such signature, or none of these keys made it.
    """
    found = _object(_json(bundle, "it"), "it")
    if (kind := found.get("mediaType")) != _BUNDLE:
        raise _refused(f"it is of type {kind!r:.100}: expected {_BUNDLE}")
    material = _object(found.get("verificationMaterial"), "verificationMaterial")
    public = _object(material.get("publicKey"), "a signature with a certificate or without a key, publicKey")
    envelope = _object(found.get("dsseEnvelope"), "dsseEnvelope")
    if (kind := envelope.get("payloadType")) != IN_TOTO:
        raise _refused(f"its payload is of type {kind!r:.100}: expected {IN_TOTO}")
    signatures = envelope.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != 1:
        count = len(signatures) if isinstance(signatures, list) else "no list of"
        raise _refused(f"it has {count} signatures: expected one")
    payload = _base64(envelope.get("payload"), "payload")
    signature = _base64(_object(signatures[0], "signatures").get("sig"), "sig")
    key = _signer(payload, signature, public.get("hint"), keys)
    return key, _files(payload)


def _signer(payload: bytes, signature: bytes, hint: object, keys: Mapping[str, str]) -> str:
    """Whose signature it is. hint: which key the bundle names; older releases name none."""
    tried = keys
    if hint not in (None, ""):
        tried = {key: pem for key, pem in keys.items() if key == f"sha256:{hint}"}
        if not tried:
            raise _refused(
                f"it was made with the key sha256:{hint!s:.64}, which is not the tenant's: expected "
                f"{expected(keys)}. Sign with that, or have the operator add yours to signing_keys"
            )
    for key, pem in tried.items():
        if is_signed(payload, signature, public_key(pem)):
            return key
    raise _refused(f"it does not fit {expected(tried)}: it was changed, or made with another key. {HOW}")


def _files(payload: bytes) -> dict[str, str]:
    """What a statement lists; it has been verified, but its writer is still a tenant."""
    statement = _object(_json(payload, "its statement"), "its statement")
    kinds = statement.get("_type"), statement.get("predicateType")
    if kinds != (STATEMENT, _PREDICATE):
        raise _refused(f"its statement is of type {kinds!r:.200}: expected {STATEMENT} and {_PREDICATE}")
    predicate = _object(statement.get("predicate"), "predicate")
    how = _object(predicate.get("serialization"), "serialization")
    if (way := (how.get("method"), how.get("hash_type"))) != ("files", "sha256"):
        raise _refused(
            f"it lists {way!r:.100}: expected whole files with sha256, as is model-signing's default"
        )
    resources = predicate.get("resources")
    if not isinstance(resources, list):
        raise _refused("its statement has no list of resources")
    files: dict[str, str] = {}
    for entry in resources:
        resource = _object(entry, "resources")
        name, digest = resource.get("name"), resource.get("digest")
        if not isinstance(name, str) or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise _refused(f"it lists {resource!r:.200}: expected a name and the sha256 of a file")
        if resource.get("algorithm") != "sha256":
            raise _refused(f"{name!r:.200} is listed with {resource.get('algorithm')!r:.50}: expected sha256")
        if not _is_plain(name):
            raise _refused(f"it lists the path {name!r:.200}: expected one within the folder")
        if name in files:
            raise _refused(f"it lists {name!r:.200} twice: expected each file once")
        files[name] = digest
    subjects = statement.get("subject")
    whole = hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()
    if not isinstance(subjects, list) or len(subjects) != 1:
        raise _refused("its statement has not one subject: expected the folder alone")
    if _object(_object(subjects[0], "subject").get("digest"), "digest").get("sha256") != whole:
        raise _refused("the digest of its subject is not that of the files that it lists")
    return files


def _is_plain(name: str) -> bool:
    """Whether a path is within its folder, and written in one way only."""
    return "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def _json(text: bytes, what: str) -> Any:
    try:
        return plain_json(text)
    except (ValueError, RecursionError) as error:
        raise _refused(f"{what} is not plain JSON ({error!s:.100})") from error


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(f"{what} is of type {type(value).__name__}: expected an object")
    return value


def _base64(value: object, what: str) -> bytes:
    try:
        if not isinstance(value, str):
            raise ValueError
        return base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        raise _refused(f"its {what} is not base64") from None


def _refused(why: str) -> AdapterRefused:
    more = "" if HOW in why or "Sign with" in why else f". {HOW}"
    return refuse("signature", f"{SIGNATURE} is not a valid signature of this upload: {why}{more}")
