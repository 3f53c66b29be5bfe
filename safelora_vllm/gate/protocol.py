"""What crosses between a gate process and its callers: settings, calls, answers, errors, and their one codec.

A message is one line of JSON whose ``type`` names its class. Any other line, or one with an unknown field
or one of another type, is a `MalformedMessage` on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from safelora_vllm import errors
from safelora_vllm.adapters.read import Limits
from safelora_vllm.errors import AdapterRefused, GateUnavailable, MalformedMessage, Reason, SafeLoRAError
from safelora_vllm.policy import Policy
from safelora_vllm.report import Report
from safelora_vllm.settings import ServerSettings
from safelora_vllm.signatures.rule import SigningRule
from safelora_vllm.tenants.quotas import Allowance

# Whatever a gate raises arrives at its caller as the same class with the same fields.
_ERRORS = (
    errors.SafeLoRAError, errors.UsageError, errors.AdapterNotFound, errors.PolicyError,
    errors.CheckpointError, errors.KeysError, errors.ProjectorCacheError, errors.UnknownAdapter,
    errors.AlreadyLoaded, errors.ChangedMeanwhile, errors.Unauthorized, errors.Forbidden, errors.UnknownRoute,
    errors.QuotaExceeded, errors.StoreDamaged, errors.Unavailable, errors.GateUnavailable,
    errors.MalformedMessage, errors.StoreUnavailable, errors.EngineUnavailable, errors.ExamUnavailable,
    errors.GuardError, errors.AdapterRefused,
)  # fmt: skip
ERRORS: dict[str, type[SafeLoRAError]] = {kind.__name__: kind for kind in _ERRORS}


@dataclass(frozen=True)
class GateConfig:
    """What a gate process is started with, the first line on its standard input.

    Attributes:
        socket: path that it listens on.
        model: the served model; compared with the cache's aligned side, unless ``trust_served_model``.
        settings: of the server.
        device: where it projects.
        dtype: of the published weights.
        max_rank: largest that is accepted. It also bounds the weights files of a small model: four times the
            float32 factors of all cached modules, and 16 MiB.
        target_modules: last parts of the names of modules that adapters may change; empty: any.
        niceness: added to the process's scheduling niceness, so that traffic goes first.
    """

    socket: str
    model: str
    settings: ServerSettings
    device: str = "cpu"
    dtype: str = "float32"
    max_rank: int = Limits.max_rank
    target_modules: tuple[str, ...] = ()
    niceness: int = 10


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call or an answer."""


class Admit(_Message, frozen=True, tag="admit"):
    """Judge an adapter folder or archive, and publish what may be served. Answer: `Judgement`.

    Attributes:
        path: of the folder or archive.
        name: of the adapter, for its report.
        policy: fields that replace those of the gate's own policy. Without ``override`` they can only make it
            stricter.
        override: an admin's word that the policy may be less strict. The published copy says so.
        keep: store the content too, so that it can be judged again without its uploader.
        allowance: what the tenant's quota leaves.
        signing: which signature the upload has to have; None where none is looked for.
    """

    path: str
    name: str
    policy: dict[str, Any] = {}
    override: bool = False
    keep: bool = True
    allowance: Allowance | None = None
    signing: SigningRule | None = None


class Ensure(_Message, frozen=True, tag="ensure"):
    """Find the published copy of stored content, or make it again. Answer: `Judgement`.

    Attributes:
        digest: of the content.
        name, policy, override: see `Admit`.
    """

    digest: str
    name: str
    policy: dict[str, Any] = {}
    override: bool = False


class GetMetrics(_Message, frozen=True, tag="metrics"):
    """Answer: `Metrics`."""


class GetState(_Message, frozen=True, tag="state"):
    """Answer: `GateState`."""


class Judgement(_Message, frozen=True, tag="judgement"):
    """What the gate decided about an adapter.

    Attributes:
        report: why.
        key: of the published copy; None for a refused adapter.
        bytes: of the content.
        ruleset_digest: see `GateState`.
        stages: seconds that the gate spent in each of its stages, in their order.
    """

    report: Report
    key: str | None
    bytes: int
    ruleset_digest: str
    stages: dict[str, float] = {}

    def __post_init__(self) -> None:
        if self.report.accepted != (self.key is not None):
            raise ValueError("an accepted adapter has a key, and no other")

    def accepted_key(self) -> str:
        """The key of the published copy.

        Raises:
            AdapterRefused: there is none, with all its reasons.
        """
        if self.key is None:
            raise AdapterRefused(self.report.reasons)
        return self.key

    def signed(self, key: str) -> Judgement:
        """The same, of content whose signature was verified before. key: the id of the key that made it."""
        return msgspec.structs.replace(self, report=self.report.signed(key))


class Metrics(_Message, frozen=True, tag="metrics"):
    """The gate's counters, as Prometheus' exposition text."""

    text: str


class GateState(_Message, frozen=True, tag="state"):
    """What a gate says of itself.

    Attributes:
        projectors: identity of its projector cache.
        policy: that it applies.
        ruleset_digest: of all that its answers depend on, besides the adapter and the adapter's own policy.
        store: the adapter store's folder.
        pid: of its process.
        busy_seconds: for how long it has been at one adapter.
        frame: all rules but the policy, see `safelora_vllm.gate.address`.
    """

    projectors: str
    policy: Policy
    ruleset_digest: str
    store: str
    pid: int
    busy_seconds: float
    frame: list[str | int] = []


class Failure(_Message, frozen=True, tag="error"):
    """An error in the place of an answer. kind: a name in `ERRORS`. reasons: of an `AdapterRefused`."""

    kind: str
    message: str
    reasons: list[Reason] = []

    def __post_init__(self) -> None:
        if (self.kind == AdapterRefused.__name__) != bool(self.reasons):
            raise ValueError("a refusal has reasons, and no other error")

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The message for an error; one that callers cannot know is the gate's own fault."""
        text = str(error).encode(errors="backslashreplace").decode()  # a file's name need not be UTF-8
        kind = type(error).__name__
        if ERRORS.get(kind) is not type(error):
            return cls(GateUnavailable.__name__, f"{kind}: {text}")
        return cls(kind, text, error.reasons if isinstance(error, AdapterRefused) else [])

    def error(self) -> SafeLoRAError:
        """The error as it was raised on the other side."""
        if (kind := ERRORS.get(self.kind)) is None:
            return MalformedMessage(f"{self.kind!r:.100} is not a valid error of a gate ({self.message})")
        if kind is AdapterRefused:
            return (
                AdapterRefused(self.reasons) if self.reasons else MalformedMessage("a refusal has no reason")
            )
        return kind(self.message)


Call = Admit | Ensure | GetMetrics | GetState
Answer = Judgement | Metrics | GateState
A = TypeVar("A", Judgement, Metrics, GateState)
_config = msgspec.json.Decoder(GateConfig)
_call: msgspec.json.Decoder[Call] = msgspec.json.Decoder(Call)
_answer: msgspec.json.Decoder[Answer | Failure] = msgspec.json.Decoder(Answer | Failure)
T = TypeVar("T")


def encode(message: Call | Answer | Failure | GateConfig) -> bytes:
    """One line.

    Raises:
        MalformedMessage: a text in it is not Unicode.
    """
    try:
        return msgspec.json.encode(message) + b"\n"
    except ValueError as error:
        raise MalformedMessage(f"{message!r:.200} cannot be sent to or by a gate: {error}") from error


def decode_config(line: bytes) -> GateConfig:
    """The start settings in a line.

    Raises:
        MalformedMessage: they are not there.
    """
    return _decode(_config, line, "configuration of a gate")


def decode_call(line: bytes) -> Call:
    """The call in a line.

    Raises:
        MalformedMessage: there is none that a gate knows.
    """
    return _decode(_call, line, "call of a gate")


def decode_answer(line: bytes, expected: type[A]) -> A:
    """The answer in a line.

    Raises:
        MalformedMessage: it is not the expected one.
        SafeLoRAError: the error that is there instead.
    """
    found = _decode(_answer, line, "answer of a gate")
    if isinstance(found, Failure):
        raise found.error()
    if not isinstance(found, expected):
        raise MalformedMessage(
            f"{type(found).__name__} is not a valid answer of a gate: expected {expected.__name__}"
        )
    return found


def _decode(decoder: msgspec.json.Decoder[T], line: bytes, what: str) -> T:
    try:
        return decoder.decode(line)
    except (ValueError, RecursionError, SafeLoRAError) as error:  # msgspec's own are ValueErrors
        shown = line[:200].decode(errors="replace").rstrip("\n")
        raise MalformedMessage(f"{shown!r} is not a valid {what}: {error}") from error
