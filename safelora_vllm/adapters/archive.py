"""Reading an adapter's files out of one archive. Nothing is extracted to disk, nothing is unpacked unbounded.

Only what every unpacking program would understand alike is accepted, so that what is judged is what
the tenant sees.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

from safelora_vllm.adapters.beside import BesideFiles
from safelora_vllm.adapters.members import ACCEPTED, BROKEN, Member, members
from safelora_vllm.errors import AdapterRefused, Fault, Reason, by_cause, refuse

MAX_MEMBERS = 1000
_MAX_NAME = 4096


def read_archive(
    data: bytes, wanted: Mapping[str, int], allowed: int, beside: BesideFiles | None = None
) -> tuple[dict[str, bytes], set[str]]:
    """The wanted members (file name in lower case → most bytes), and the names of all other members.

    They lie at the top or in one folder. A wanted file that is nowhere is missing from the answer.
    ``allowed`` bounds the bytes of a tar that are decompressed, also those that are skipped over. ``beside``
    takes all other files.

    Raises:
        AdapterRefused: archive_malformed, archive_unsafe, archive_ambiguous, not_regular_file,
            too_large, or missing_file for a file that lies too deep.
    """
    places: dict[str, list[str]] = {name: [] for name in wanted}
    contents: dict[str, bytes] = {}
    others: set[str] = set()
    unsafe: list[Fault] = []
    reasons: list[Reason] = []
    try:
        for count, member in enumerate(members(data, allowed), start=1):
            if count > MAX_MEMBERS:
                raise refuse("too_large", f"the archive has more than {MAX_MEMBERS:,} members; pack fewer")
            if len(member.name) > _MAX_NAME:
                raise ValueError(f"a member's name has {len(member.name):,} characters")
            if fault := _fault(member):
                unsafe.append(Fault("archive_unsafe", f"{member.name!r}", fault))
            parts = _parts(member.name)
            name = parts[-1] if parts else ""
            if (key := name.casefold()) not in wanted:
                others.add(name)
                if beside is not None and member.kind == "device":
                    reasons.append(Reason("not_regular_file", f"{name!r:.200} is a device in the archive"))
                elif beside is not None and member.kind == "file":
                    beside.add("/".join(parts), member.content)
                continue
            places[key].append("/".join(parts))
            if member.kind != "file":
                reasons.append(Reason("not_regular_file", f"{key} is a {member.kind} in the archive"))
            elif name == key and len(places[key]) == 1 and len(parts) <= 2:
                content = _content(member, wanted[key])
                if content is None:
                    reasons.append(Reason("too_large", f"{key} is over the {wanted[key]:,} bytes allowed"))
                else:
                    contents[key] = content
    except AdapterRefused as error:
        raise AdapterRefused([*by_cause(unsafe), *reasons, *error.reasons]) from error
    except BROKEN as error:
        broken = f"the archive is damaged or not of the plain kind ({error!s:.200}); {ACCEPTED}"
        found = [*by_cause(unsafe), *reasons, Reason("archive_malformed", broken)]
        raise AdapterRefused(found) from error
    if found := [*by_cause(unsafe), *reasons, *_check_places(places)]:
        raise AdapterRefused(found)
    if beside is not None:
        beside.folder = min(_folders(places), default="")
    return contents, others


def _parts(name: str) -> list[str]:
    """A member's path. Some Windows tools write backslashes; ``./`` and ``//`` mean nothing."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _fault(member: Member) -> str | None:
    """Why a member could be made to reach outside of where it is unpacked, if it could."""
    if member.kind == "link":
        return "a link; pack the file itself"
    if re.match(r"[/\\]|[A-Za-z]:", member.name):
        return "an absolute path; pack the folder from within its parent"
    if ".." in _parts(member.name) or "\0" in member.name:
        return "'..' or a zero byte in its path; pack the folder from within its parent"
    return None


def _check_places(places: Mapping[str, list[str]]) -> list[Reason]:
    """Each wanted file stands once, all in one folder, and that at the top."""
    reasons = []
    for name, paths in places.items():
        if len(paths) > 1:
            found = f"{name} is there {len(paths)} times, as {paths[0]!r:.200} and {paths[1]!r:.200}"
            reasons.append(Reason("archive_ambiguous", f"{found}; pack one adapter, without checkpoints"))
        elif paths and paths[0].count("/") > 1:
            reasons.append(Reason("missing_file", f"{paths[0]!r:.200} lies too deep; pack its own folder"))
    folders = _folders(places)
    if len(folders) > 1:
        first, second = sorted(folders)[:2]
        found = f"the files lie in two folders, {first!r:.200} and {second!r:.200}"
        reasons.append(Reason("archive_ambiguous", f"{found}; pack them in one"))
    return reasons


def _folders(places: Mapping[str, list[str]]) -> set[str]:
    return {paths[0].rpartition("/")[0] for paths in places.values() if len(paths) == 1}


def _content(member: Member, limit: int) -> bytes | None:
    """All of a member, or None where it is larger than the limit."""
    if member.size > limit:
        return None
    buffer = io.BytesIO()  # gives its bytes away without a copy, unlike a join
    for part in member.content:
        buffer.write(part)
        if buffer.tell() > limit:
            return None
    if buffer.tell() != member.size:
        raise ValueError(f"a member of {member.size:,} bytes has {buffer.tell():,}")
    return buffer.getvalue()
