"""Whether an upload is signed as its tenant's rule says: all of its files, no more and no less."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safelora_vllm.adapters.beside import SIGNATURE
from safelora_vllm.adapters.read import RawAdapter
from safelora_vllm.errors import AdapterRefused, Reason, named, refuse
from safelora_vllm.signatures.model_signing import HOW, signed_files
from safelora_vllm.signatures.rule import SigningRule


def signer_of(raw: RawAdapter, rule: SigningRule | None) -> str:
    """The id of the key that an upload is signed with; empty without a signature, or without keys.

    Raises:
        AdapterRefused: the signature is missing or wrong, or of other files; with the code ``signature``.
    """
    if rule is None or not rule.keys:
        return ""
    if raw.beside is None or raw.beside.signature is None:
        if not rule.required:
            return ""
        raise refuse(
            "signature",
            f"the upload has no {SIGNATURE}: expected a signature with {rule.expected}, because this "
            f"tenant's uploads have to be signed (require_signature). {HOW}, and upload that file too",
        )
    key, signed = signed_files(raw.beside.signature, rule.keys)
    uploaded = {name: hashlib.sha256(data).hexdigest() for name, data in raw.files.items()}
    if reasons := _differences(signed, {**raw.beside.digests, **uploaded}):
        raise AdapterRefused(reasons)
    return key


def _differences(signed: Mapping[str, str], uploaded: Mapping[str, str]) -> list[Reason]:
    """A reason for each way in which they differ."""
    both = signed.keys() & uploaded.keys()
    found = {
        "other bytes were signed than were uploaded. Sign what you upload, after its last change":
            {name for name in both if signed[name] != uploaded[name]},
        f"uploaded, but not in {SIGNATURE}. Leave it out, or sign the folder again with it":
            uploaded.keys() - both,
        f"in {SIGNATURE}, but not uploaded. Upload it too (in an archive of the folder), or sign the folder "
        "again without it (--ignore-paths)":
            signed.keys() - both,
    }  # fmt: skip
    return [
        Reason("signature", f"{named(sorted(names))}: {cause}") for cause, names in found.items() if names
    ]
