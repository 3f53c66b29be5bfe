"""DSSE: an envelope whose signature is of its payload and of the payload's type.

https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from safelora_vllm.signatures.keys import key_id

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

IN_TOTO = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"  # the type in such a payload


def signed_bytes(kind: str, payload: bytes) -> bytes:
    """The pre-authentication encoding, PAE: what is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def sign(payload: bytes, key: EllipticCurvePrivateKey, kind: str = IN_TOTO) -> dict[str, Any]:
    """An envelope with one signature, ECDSA over SHA-256."""
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    signature = key.sign(signed_bytes(kind, payload), ECDSA(SHA256()))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def is_signed(payload: bytes, signature: bytes, key: EllipticCurvePublicKey) -> bool:
    """Whether a signature is this key's, of this payload as an in-toto statement."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        key.verify(signature, signed_bytes(IN_TOTO, payload), ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True
