"""Keys on the elliptic curve P-256. No other kind is read: a signature cannot choose its algorithm."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from safelora_vllm.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

_CURVE = "secp256r1"
_NO_PACKAGE = "signatures need the package cryptography: pip install '.[signing]' in the checkout"


def public_key(pem: str) -> EllipticCurvePublicKey:
    """The key in a PEM.

    Raises:
        UsageError: it is another kind of key, or none; or the package for it is missing.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise UsageError(_NO_PACKAGE) from error
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name != _CURVE:
        raise UsageError(
            f"the key is {_kind(key)}: expected a public key of the curve P-256 in PEM, which "
            "'openssl pkey -in KEY -pubout' prints"
        )
    return key


def private_key(pem: bytes) -> EllipticCurvePrivateKey:
    """The same of a private key, which has no password."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise UsageError(_NO_PACKAGE) from error
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name != _CURVE:
        raise UsageError(
            f"the key is {_kind(key)}: expected a private key of the curve P-256 in PEM, without a password. "
            "Make one with 'openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY'"
        )
    return key


def key_id(key: EllipticCurvePublicKey) -> str:
    """``sha256:`` and the digest of the key's PEM: what model-signing writes as ``hint``."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(pem).hexdigest()}"


def _kind(key: object) -> str:
    """What was found instead; never its content."""
    if key is None:
        return "none that can be read"
    curve = getattr(getattr(key, "curve", None), "name", "")
    return f"of the curve {curve}" if curve else f"of type {type(key).__name__}"
