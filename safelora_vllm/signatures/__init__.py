"""Signatures: of what tenants upload (OpenSSF Model Signing, with a key), and of what the gate decided.

The formats are a Sigstore bundle, DSSE and an in-toto statement. Keys are of the elliptic curve P-256 only.
docs/signatures.md says why this is not the package ``model-signing``.
"""
