"""What an upload holds besides its two files: a signature, and the digests of all others that it covers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from safelora_vllm.errors import refuse

SIGNATURE = "model.sig"
SIGNATURE_BYTES = 1024 * 1024  # of all files of that name: which one counts is known late
MAX_FILES = 1000
BESIDE_BYTES = 64 * 1024**2  # tokenizer, README


@dataclass(frozen=True)
class Beside:
    """Files of an upload by their path in the adapter's folder.

    digests: path → sha256, hexadecimal, of all but the signature. signature: its content; None without one.
    """

    digests: dict[str, str]
    signature: bytes | None = field(default=None, repr=False)


class BesideFiles:
    """Takes files one after the other, and keeps no more of them than a digest.

    folder: that the adapter is in. fault: what is wrong with them, which counts only where there is a
    signature; no more files are read then.
    """

    def __init__(self) -> None:
        self.folder = ""
        self._digests: dict[str, str] = {}
        self._signatures: dict[str, bytes] = {}
        self._bytes = 0
        self.fault = ""

    def add(self, path: str, pieces: Iterable[bytes]) -> None:
        """One file, with its path in the upload."""
        is_signature = path.rpartition("/")[2] == SIGNATURE
        if is_signature:
            self._signatures.setdefault(path, b"")
        if path in self._digests:
            self.fault = f"{path!r:.200} is there twice: expected each file once"
        elif len(self._digests) >= MAX_FILES:
            self.fault = f"the upload has more than {MAX_FILES:,} files; sign and upload fewer"
        if self.fault:
            return
        content, digest = bytearray(), hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
            self._bytes += len(piece)
            content += piece if is_signature else b""
            if self._bytes > BESIDE_BYTES:
                self.fault = f"the files besides both are over {BESIDE_BYTES:,} bytes; sign and upload fewer"
            elif len(content) + sum(map(len, self._signatures.values())) > SIGNATURE_BYTES:
                self.fault = f"{SIGNATURE} is over the {SIGNATURE_BYTES:,} bytes that are allowed"
            if self.fault:
                return
        self._digests[path] = digest.hexdigest()
        if is_signature:
            self._signatures[path] = bytes(content)

    def found(self) -> Beside:
        """All of them, seen from the adapter's folder.

        Raises:
            AdapterRefused: there is a signature, but the files cannot be compared with one.
        """
        prefix = f"{self.folder}/" if self.folder else ""
        own = f"{prefix}{SIGNATURE}"
        if self.fault and own in self._signatures:
            raise refuse("signature", f"the upload cannot be compared with its signature: {self.fault}")
        digests = {
            path.removeprefix(prefix) if path.startswith(prefix) else f"../{path}": digest
            for path, digest in self._digests.items()
            if path != own
        }
        return Beside(digests, self._signatures.get(own))
