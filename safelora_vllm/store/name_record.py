"""What is stored about an adapter's name, and its form on disk.

The policy, who made it and why stand in the version, so that going back to an older one brings all
of that back too.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from safelora_vllm.errors import Reason, UsageError
from safelora_vllm.files import is_digest
from safelora_vllm.policy import stored_values

KEPT_VERSIONS = 10
SUFFIX = ".json"
_FORMAT = 1
_LONGEST = 255  # bytes of a file name, in all of Linux's file systems
_TYPES: dict[str, tuple[type, ...]] = {
    "version": (int,), "digest": (str,), "bytes": (int,), "rank": (int,), "created": (int, float),
    "by": (str,), "policy": (dict,), "override": (bool,), "base_policy": (dict,),
    "reason": (str,), "key": (str,), "ruleset_digest": (str,), "id": (int,),
    "load_seconds": (int, float), "refused": (tuple,), "judged": (int, float),
    "signed_by": (str,), "exam_override": (bool,), "apart": (bool,),
}  # fmt: skip
# Not written with these values, so that older releases read the rest.
_LATER = {
    "refused": (),
    "judged": 0.0,
    "signed_by": "",
    "exam_override": False,
    "apart": False,
}
_ON_DISK = {"ruleset_digest": "rules", "base_policy": "underlying"}  # fields with another name there
_FIELDS = {name: field for field, name in _ON_DISK.items()}


@dataclass(frozen=True)
class Version:
    """One version of an adapter.

    digest: of the raw content. bytes: its size. rank: the largest of its modules. created: seconds
    since 1970. by: the tenant or operator. policy: what an admin set for it, none for the server's.
    override: an operator made that policy less strict than the server's. base_policy: what an override leaves
    in force for the name's next content. reason: why it is as it is. key: of the published copy.
    ruleset_digest: of the server's rules under which that was published. id: the first of the numbers by
    which vLLM knows this version's weights. load_seconds: from the request to the change of the name.
    signed_by: id of the key whose signature of the upload was verified.
    exam_override: an admin has it served whatever its exam says. apart: by a server that keeps tenants apart.
    """

    version: int
    digest: str
    bytes: int
    rank: int
    created: float
    by: str
    policy: dict[str, Any] = field(default_factory=dict)
    override: bool = False
    base_policy: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    key: str = ""
    ruleset_digest: str = ""
    id: int = 0
    load_seconds: float = 0.0
    refused: tuple[Reason, ...] = ()
    judged: float = 0.0
    signed_by: str = ""
    exam_override: bool = False
    apart: bool = False

    @property
    def unjudged(self) -> Version:
        """What a caller made of it: all but what judging anew changes."""
        return dataclasses.replace(self, key="", ruleset_digest="", id=0, refused=(), judged=0.0)

    @property
    def next_policy(self) -> dict[str, Any]:
        """The policy that the name's next content gets: an override is for its own content only."""
        return self.base_policy if self.override else self.policy


@dataclass(frozen=True)
class AdapterRecord:
    """A name with its versions, oldest first. ``AdapterRecord(name)`` has none yet."""

    name: str
    current: int = 0
    versions: tuple[Version, ...] = ()

    @property
    def live(self) -> Version:
        """The version that is served."""
        return self.version(self.current)

    def version(self, number: int) -> Version:
        """The version of this number.

        Raises:
            UsageError: there is none.
        """
        for version in self.versions:
            if version.version == number:
                return version
        known = [version.version for version in self.versions]
        raise UsageError(f"adapter {self.name!r} has no version {number!r:.100}; it has {known}")

    def with_version(self, new: Version) -> AdapterRecord:
        """With a new version, which gets the next number and is served. The newest ten stay."""
        number = max((version.version for version in self.versions), default=0) + 1
        new = dataclasses.replace(new, version=number)
        return AdapterRecord(self.name, number, (*self.versions, new)[-KEPT_VERSIONS:])

    def with_live(self, live: Version) -> AdapterRecord:
        """With what judging the live version anew made of it."""
        return dataclasses.replace(
            self, versions=tuple(live if old.version == self.current else old for old in self.versions)
        )

    def without(self, number: int) -> AdapterRecord:
        """Without an old version.

        Raises:
            UsageError: there is none of this number, or it is the live one.
        """
        if self.version(number) == self.live:
            raise UsageError(
                f"version {number} of {self.name!r} is the one that is served: expected an older one. Remove "
                "the adapter instead, or replace it first"
            )
        return dataclasses.replace(self, versions=tuple(v for v in self.versions if v.version != number))

    @property
    def unjudged(self) -> AdapterRecord:
        """What callers made of it: see `Version.unjudged`."""
        return dataclasses.replace(self, versions=tuple(version.unjudged for version in self.versions))


def tenant_of(name: str) -> str:
    """Who owns a name; nobody for one without a slash."""
    owner, slash, _ = name.partition("/")
    return owner if slash else ""


def file_of(name: str) -> str:
    """The name of a record's file.

    Raises:
        UsageError: the adapter's name is empty, not Unicode text, or too long for a file.
    """
    try:
        file = quote(name, safe="") + SUFFIX
    except UnicodeEncodeError as error:
        raise UsageError(f"{name!r:.100} is not a valid adapter name: expected Unicode text") from error
    if not name or len(file) > _LONGEST:
        raise UsageError(
            f"{name!r:.100} is not a valid adapter name: it takes {len(file)} bytes as a file name; give one "
            f"of 1 to about {_LONGEST - len(SUFFIX)} letters and digits"
        )
    return file


def to_dict(record: AdapterRecord) -> dict[str, Any]:
    """A record as it is stored."""
    data = dataclasses.asdict(record)
    data["versions"] = [_stored(version) for version in data["versions"]]
    return data


def _stored(version: dict[str, Any]) -> dict[str, Any]:
    """A version as it is stored."""
    later = {name for name, value in _LATER.items() if version[name] == value}
    return {_ON_DISK.get(name, name): value for name, value in version.items() if name not in later}


def to_json(record: AdapterRecord, file: str) -> bytes:
    """The content of a record's file; ValueError, KeyError or TypeError where it could not be read."""
    text = json.dumps({"format": _FORMAT, **to_dict(record)}, indent=1).encode()
    from_json(text, file)
    return text


def from_json(text: bytes, file: str) -> AdapterRecord:
    """The record in a file; ValueError, KeyError or TypeError where there is none of this name."""
    data = json.loads(text, parse_constant=_no_number)
    if data["format"] != _FORMAT:
        raise ValueError(f"its format is {data['format']!r:.100}, this safelora reads {_FORMAT}")
    found = tuple(map(_version, data["versions"]))
    for version in found:
        for name, types in _TYPES.items():
            if type(getattr(version, name)) not in types:
                raise ValueError(f"{name} is {getattr(version, name)!r:.100}")
        if not is_digest(version.digest):
            raise ValueError(f"digest is {version.digest!r:.100}")
    versions = tuple(_in_todays_words(version) for version in found)
    record = AdapterRecord(data["name"], data["current"], versions)
    numbers = [version.version for version in versions]
    if not numbers or numbers != sorted(set(numbers)):
        raise ValueError(f"its versions are {numbers}")
    if type(record.current) is not int or record.current not in numbers:
        raise ValueError(f"its current version is {record.current!r:.100}, of {numbers}")
    if record.name != unquote(file.removesuffix(SUFFIX)) or file_of(record.name) != file:
        raise ValueError(f"it is the record of {record.name!r:.100}")
    return record


def _in_todays_words(version: Version) -> Version:
    policy, base_policy = stored_values(version.policy), stored_values(version.base_policy)
    return dataclasses.replace(version, policy=policy, base_policy=base_policy)


def _version(stored: Any) -> Version:
    values = {_FIELDS.get(name, name): value for name, value in {**stored}.items()}
    return Version(**{**values, "refused": tuple(map(_reason, values.get("refused", ())))})


def _reason(stored: Any) -> Reason:
    if not all(isinstance(text, str) for text in {**stored}.values()):
        raise ValueError(f"a reason is {stored!r:.100}")
    return Reason(**stored)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")
