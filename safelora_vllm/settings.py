"""Settings of a guarded server: ``--additional-config '{"safelora": {…}}'`` reaches every worker.

Each setting and its default stand here only: the gate is started with this class, the defaults in the
command's help are read from it, and the tables of docs/configuration.md are made from the docstrings.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import msgspec

from safelora_vllm.adapters.read import Limits
from safelora_vllm.durations import seconds_in
from safelora_vllm.errors import GuardError, PolicyError, UsageError
from safelora_vllm.exam import ladder
from safelora_vllm.exam.probes import languages_in
from safelora_vllm.exam.score import THRESHOLD
from safelora_vllm.policy import Policy
from safelora_vllm.remote.address import parse_prefix
from safelora_vllm.remote.reach import Reach
from safelora_vllm.store.layout import default_root
from safelora_vllm.tenants.exam_rules import MODES

SECTION = "safelora"
PLUGIN = "safelora"  # in VLLM_PLUGINS
ADMIN_KEY = "SAFELORA_ADMIN_API_KEY"
ADMIN_KEY_MADE = "SAFELORA_ADMIN_API_KEY_MADE"  # set by a server that made the key itself
METRICS_KEY = "SAFELORA_METRICS_KEY"
WORKER = "worker"  # the gate's device is its worker's
_GATE_DEVICE = re.compile(rf"{WORKER}|cpu|[a-z]+:[0-9]{{1,3}}")
TENANT_REPORTS = ("full", "summary")
LEAST_TOKENS, MOST_TOKENS = 8, 256  # of a second opinion; with fewer no refusal is heard
EXAMS = MODES
WEIGHT_TRANSFER = (
    "a weight transfer (--weight-transfer-config) would put weights into the server that its projector cache "
    "was not built for; leave it out, and start a new server for a new model"
)
TOWER_LORA = (
    "--enable-tower-connector-lora has vLLM keep what an image's encoder made by the name of an adapter: a "
    "new version would answer with what a replaced one made; leave it out"
)


@dataclass(frozen=True)
class ServerSettings:
    """The ``safelora`` section.

    Attributes:
        projectors: folder of the projector cache.
        store: folder of the adapter store.
        store_mirror: address of a bucket, such as ``s3://bucket/prefix``, that decides which names there are.
            Servers with stores on several disks and one bucket serve the same.
        policy: fields of the policy, by their names there.
        trust_served_model: do not compare the served model with the cache's aligned model. For a copy in a
            form that cannot be compared: see quantised-models.md.
        gate_device: where the gate projects: ``worker``, the device of the worker that starts it; ``cpu``; or
            another one that this worker sees, such as ``cuda:1``.
        projector_memory: most bytes of its device that the gate takes for projectors and for the work of an
            adapter. Without it, what the policy takes in all. With less, Ĉ or V of some modules is in host
            memory or read from disk at each use. Only Ĉ and V can be elsewhere: where the policy reads
            neither, or the cache is thin, less stops the start.
        projector_host_memory: most bytes of pinned host memory for the Ĉ and V that ``projector_memory`` has
            no room for. Not for a gate on a CPU.
        max_adapter_bytes: largest upload that is received, and largest weights file that the gate reads.
        store_bytes: budget of the published copies in the store.
        keys: TOML file with admin and tenant keys.
        adapter_roots: folders that loads by path may read. Without one, ``load_lora_adapter`` reads any
            folder and ``POST /v1/adapters`` none.
        remote_sources: prefixes of ``s3://``, ``gs://``, ``az://`` and ``https://`` addresses that an admin's
            loads may read. Each tenant has its own in the keys file. Without one, none is read.
        remote_endpoints: origins, such as ``http://minio.storage:9000``, that remote sources may be read from
            although their network address is private or they have no TLS.
        concurrent_uploads: uploads that one API server receives at once. Others get status 429.
        allow_hub: uploads and ``load_lora_adapter`` may name a hub repository.
        admin_socket: Unix socket of callers that cannot send a key. Whoever connects and sends no key is an
            admin. It has mode 0600, in a folder of the server's user that others cannot write to. A folder
            that is not there is made.
        private_docs: ``/openapi.json``, ``/docs`` and ``/redoc`` need a key, any of them.
        no_page: the server has no page at ``/safelora/``.
        route_access: who may call a route of another plugin: ``anybody``, ``users`` or ``tenants``. In the
            section an object such as ``{"GET /x": "users"}``. A route without an entry needs an admin key.
        tenant_reports: what callers other than admins are told of an adapter's figures: ``full``, those of
            each module, or ``summary``, none of single modules. They help whoever tries out the gate.
        audit_stdout: each record of the audit log is also a line of standard output.
        exam: whether each adapter is asked what the aligned model refuses: ``off``, ``report``, which serves
            it whatever comes out, or ``enforce``, which serves what has passed.
        exam_threshold: largest loyalty drop that passes, in nats per token, with its confidence bound.
        ladder: policies that an adapter is served by, mildest first, such as
            ``input-removal:0.1,input-removal:0.8,safe-lora``. ``as-uploaded`` projects nothing, and
            ``+opinion`` after a rung adds a second opinion: ``as-uploaded,as-uploaded+opinion``. Without
            it, those of the command ``exam`` that the projector cache can serve. A policy of the server,
            tenant or adapter goes first, and no milder rung follows. Only with ``exam`` ``enforce``.
        exam_probes: file of JSON lines, each with a ``prompt``, that the aligned model refuses. It is read
            again when it changes. Without it, built-in ones are drawn with a secret of the store.
        exam_every: how often what is served is examined again with the held-out half of the probes, such as
            ``24h``. With ``exam`` ``enforce``, what fails is withdrawn. Without it, only an admin's request
            examines again.
        exam_languages: of the built-in probes, harmless ones too: some of ``en,de,es,fr``, in which the
            aligned model refuses.
        second_opinion: tokens of the aligned model's own answer that each request for an adapter waits for.
            If they refuse, that answer is served instead of the adapter's. 0: only requests for adapters
            whose policy or rung of the ladder has ``opinion`` wait for one, of 16 tokens.
    """

    projectors: str
    store: str = field(default_factory=lambda: str(default_root()))
    policy: dict[str, Any] = field(default_factory=dict)
    trust_served_model: bool = False
    gate_device: str = WORKER
    projector_memory: int | None = None
    projector_host_memory: int = 0
    max_adapter_bytes: int = Limits.weights_bytes
    store_bytes: int | None = None
    keys: str | None = None
    adapter_roots: list[str] = field(default_factory=list)
    remote_sources: list[str] = field(default_factory=list)
    remote_endpoints: list[str] = field(default_factory=list)
    store_mirror: str | None = None
    concurrent_uploads: int = 8
    allow_hub: bool = False
    admin_socket: str | None = None
    private_docs: bool = False
    no_page: bool = False
    route_access: dict[str, str] = field(default_factory=dict)
    tenant_reports: str = "full"
    audit_stdout: bool = False
    exam: str = "off"
    exam_threshold: float = THRESHOLD
    ladder: str | None = None
    exam_probes: str | None = None
    exam_every: str | None = None
    exam_languages: str = "en"
    second_opinion: int = 0

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> ServerSettings:
        """Read the section.

        Raises:
            GuardError: no section, no ``projectors`` in it, an unknown key, or a value of another type.
            PolicyError: values out of range, or without effect.
        """
        section = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
        if not isinstance(section, Mapping) or not section.get("projectors"):
            raise GuardError(
                "safelora is loaded but has no projector cache, so no adapter may be served. Start "
                "with 'safelora-vllm serve MODEL --projectors DIR', or give vLLM "
                """--additional-config '{"safelora": {"projectors": "DIR"}}'; to run without the """
                "guard, leave safelora out of VLLM_PLUGINS or uninstall it"
            )
        if unknown := sorted(set(section) - set(FIELDS)):
            raise GuardError(f"unknown safelora settings {unknown}; known are {sorted(FIELDS)}")
        values: dict[str, Any] = {}
        wrong: list[str] = []
        for name, value in msgspec.to_builtins(dict(section), enc_hook=str).items():  # a Path is its text
            try:
                values[name] = msgspec.convert(value, FIELDS[name])
            except msgspec.ValidationError as error:
                wrong.append(f"{name} is {value!r:.80}: {error}")
        if wrong:
            raise GuardError(f"safelora settings: {'; '.join(wrong)}; see docs/configuration.md")
        settings = cls(**values)
        Policy.from_mapping(settings.policy).check_effective(settings.policy)
        return settings

    def __post_init__(self) -> None:
        if not _GATE_DEVICE.fullmatch(self.gate_device):
            raise GuardError(
                f"gate_device is {self.gate_device!r:.80}: expected {WORKER}, cpu, or a device such as cuda:1"
            )
        for name in ("projector_memory", "projector_host_memory"):
            if (getattr(self, name) or 0) < 0:
                raise GuardError(f"{name} is {getattr(self, name)}: expected bytes, 0 or more")
        if self.concurrent_uploads < 1:
            raise GuardError(f"concurrent_uploads is {self.concurrent_uploads}: expected 1 or more")
        if self.projector_host_memory and self.projector_memory is None:
            raise GuardError(
                "projector_host_memory has no effect without projector_memory: all projectors are on the "
                "gate's device. Leave it out, or set projector_memory"
            )
        try:
            Reach.to(self.remote_endpoints)
            for prefix in self.remote_sources:
                parse_prefix(prefix)
        except UsageError as error:
            raise GuardError(str(error)) from None
        if self.tenant_reports not in TENANT_REPORTS:
            raise GuardError(
                f"tenant_reports is {self.tenant_reports!r:.80}: expected {' or '.join(TENANT_REPORTS)}"
            )
        if self.second_opinion and not LEAST_TOKENS <= self.second_opinion <= MOST_TOKENS:
            raise GuardError(
                f"--second-opinion is {self.second_opinion}: expected {LEAST_TOKENS} to {MOST_TOKENS} "
                "tokens, such as 16, or 0 for none"
            )
        if self.policy.get("select") == "none" and not self._looks_at_harm:
            raise GuardError(
                "--select none serves adapters as they were uploaded, and nothing else would hold harm back: "
                "add --second-opinion 16 or --exam enforce. To serve whatever is uploaded while you try a "
                "policy, add --mode report-only instead"
            )
        self._check_exam()

    @property
    def _looks_at_harm(self) -> bool:
        """Whether something else than a projection does, or the operator wants nothing to."""
        by_model = self.second_opinion or self.policy.get("opinion") or self.exam == "enforce"
        return bool(by_model or self.policy.get("mode", "enforce") != "enforce")

    def _check_exam(self) -> None:
        if self.exam not in EXAMS:
            raise GuardError(f"--exam is {self.exam!r:.80}: expected {', '.join(EXAMS)}")
        if not 0 < self.exam_threshold < math.inf:
            raise GuardError(f"--exam-threshold is {self.exam_threshold}: expected a finite number above 0")
        if self.ladder is not None:
            if self.exam != "enforce":
                raise GuardError("--ladder has no effect without --exam enforce: leave it out, or add that")
            try:
                ladder.parse(self.ladder, Policy())
            except PolicyError as error:
                raise GuardError(str(error)) from None
        if self.exam == "off" and (self.exam_probes or self.exam_every or self.exam_threshold != THRESHOLD):
            raise GuardError(
                "--exam-probes, --exam-every and --exam-threshold have no effect without --exam: leave them "
                "out, or add --exam report or --exam enforce"
            )
        if self.exam == "off" and self.exam_languages != ServerSettings.exam_languages:
            raise GuardError(
                "--exam-languages has no effect without --exam: leave it out, or add --exam report or "
                "--exam enforce"
            )
        try:
            languages_in(self.exam_languages)
        except UsageError as error:
            raise GuardError(f"--exam-languages: {error}") from None
        if self.exam_every is not None:
            try:
                seconds_in(self.exam_every)
            except UsageError as error:
                raise GuardError(f"--exam-every: {error}") from None

    @property
    def exam_given(self) -> tuple[str, float, str | None]:
        """Mode, threshold and ladder, with which those of tenants are compared."""
        return self.exam, self.exam_threshold, self.ladder

    @property
    def names_opinion(self) -> bool:
        """Whether these settings give any adapter a second opinion. A policy that is set later may, too."""
        rungs = self.ladder.split(",") if self.ladder else []
        by_rung = any(rung.strip().endswith(ladder.OPINION) for rung in rungs)
        return bool(self.second_opinion or self.policy.get("opinion") or by_rung)

    def to_section(self) -> dict[str, Any]:
        """The inverse, for ``--additional-config``."""
        return {SECTION: dataclasses.asdict(self)}


FIELDS: dict[str, Any] = get_type_hints(ServerSettings)  # name → type


def new_admin_key() -> str:
    """A random key for servers that were given none, printed once."""
    key = secrets.token_urlsafe(24)
    os.environ[ADMIN_KEY_MADE] = "1"
    print(f"\nsafelora: admin key for this run (set {ADMIN_KEY} to choose it): {key}\n", flush=True)
    return key
