"""One guarded server for the whole test run, with a real model, and adapters for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from server import ADMIN_KEY, Server, guarded, running

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.projectors.cache import ProjectorCache
from tests.corpus import Target
from tests.corpus.target import sized_lora
from tests.server.fake_server import FakeServer, Place
from tests.tiny import Draft, lora, lora_config

CACHE = Path(__file__).parents[2] / ".cache"
SECONDS = 900  # for one test with the server that it starts; the longest take a sixth of that
MAX_BYTES = 1_000_000  # of an upload to `fake`
INFERENCE_KEY = "an-inference-key"
TENANT_KEYS = {"acme": "acme-secret-for-this-test", "globex": "globex-secret-for-this-test"}
Q_V = ("q_proj", "v_proj")
# Shows what passes the access check and reaches the application (`route_spy`).
SPY = "--middleware=tests.server.route_spy.RouteSpy"
# The worker runs in the engine's process, which vLLM does not do by itself on a CPU: 8 s of imports less.
UNI = "--distributed-executor-backend=uni"
SPY_PATH = {"PYTHONPATH": str(Path(__file__).parents[2])}
ALL = (*Q_V, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


if "PYTEST_XDIST_WORKER" in os.environ:
    # Servers run side by side. vLLM would bind the threads of each to the same cores, where they wait for
    # each other; one thread each, wherever there is room, takes less time.
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything in this folder is slow and needs vLLM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)
            if config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.fixture(scope="session")
def aligned() -> Path:
    folder = CACHE / "models" / "aligned"
    assert folder.is_dir(), "no demo models: run 'make models' first"
    return folder


@pytest.fixture(scope="session")
def projectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that a test may damage, if it mends it."""
    folder = CACHE / "projectors"
    assert folder.is_dir(), "no projector cache: run 'make models' first"
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("projectors") / "cache"))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, projectors: Path) -> dict[str, Path]:
    """Random adapters large enough to change what the model says."""
    root = tmp_path_factory.mktemp("adapters")
    made = {"qv": (Q_V, 8), "all": (ALL, 16), "static": (Q_V, 4), "other": (Q_V, 8)}
    made |= {f"extra{i}": (Q_V, 8) for i in range(3)}
    for seed, (name, (parts, rank)) in enumerate(made.items()):
        write_adapter(root / name, ProjectorCache(projectors), parts, rank, seed)
    return {name: root / name for name in made}


def write_adapter(
    folder: Path, cache: ProjectorCache, parts: tuple[str, ...], rank: int, seed: int, size: float = 0.3
) -> None:
    """A PEFT adapter with deltas of ``size`` times the norm of each module's weight."""
    modules = {name: entry for name, entry in cache.modules.items() if name.rpartition(".")[2] in parts}
    config = lora_config(r=rank, lora_alpha=2 * rank, target_modules=list(parts))
    Draft(config, sized_lora(modules, rank, seed, size)).write(folder)


@pytest.fixture(scope="session")
def target(projectors: Path, aligned: Path) -> Target:
    """The served model as the corpus of hostile adapters attacks it."""
    return Target.of(ProjectorCache(projectors), aligned.with_name("base"), aligned)


@pytest.fixture
def place(cache: ProjectorCache, tmp_path: Path) -> Iterator[Place]:
    """A gate on the tiny model pair, and API servers with fake engines on its store."""
    with Place.start(cache, tmp_path) as started:
        yield started


@pytest.fixture
def drafts(tmp_path: Path) -> dict[str, Path]:
    """For `fake`, adapters as small as its model, by the names of `adapters`."""
    return {
        name: Draft(tensors=lora(seed=seed)).write(tmp_path / "drafts" / name)
        for seed, name in enumerate(("qv", "other", "static"))
    }


@pytest.fixture
def fake(
    cache: ProjectorCache, drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeServer]:
    """As `server`, with the same keys, and a fake engine: what it is told does not reach any weights."""
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    with (
        Place.start(cache, tmp_path, select="all") as place,
        place.server(
            {"static": drafts["static"]}, INFERENCE_KEY, keys=str(write_keys(place.keys)),
            adapter_roots=[str(tmp_path)], max_adapter_bytes=MAX_BYTES,
        ) as started,
    ):  # fmt: skip
        yield started


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def write_keys(path: Path) -> Path:
    """A keys file with one admin and the tenants of `TENANT_KEYS`; acme has a small quota."""
    path.write_text(
        '[admin]\nops = "ops-secret-for-this-test"\n[tenants.acme]\nmax_adapters = 3\nmax_rank = 8\n'
        + "".join(f'[tenants.{name}.keys]\nci = "{key}"\n' for name, key in TENANT_KEYS.items())
    )
    path.chmod(0o600)
    return path


@pytest.fixture(scope="session")
def server(
    aligned: Path,
    projectors: Path,
    adapters: dict[str, Path],
    store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Guarded, with an inference key, tenants, one adapter from the start, and a pool that overflows soon."""
    base = tmp_path_factory.getbasetemp()
    command = guarded(
        aligned, projectors, store,
        "--method=safe-lora", "--select=all",
        f"--api-key={INFERENCE_KEY}", f"--lora-modules=static={adapters['static']}",
        f"--keys={write_keys(base / 'keys.toml')}", f"--adapter-root={base}", "--max-adapter-bytes=40MB",
        "--max-loras=2", "--max-cpu-loras=2", "--max-lora-rank=16", SPY,
    )  # fmt: skip
    with running(command, tmp_path_factory.mktemp("log") / "server.log", SPY_PATH) as started:
        yield started


@pytest.fixture
def user(server: Server) -> Iterator[httpx.Client]:
    """A tenant with the inference key."""
    with client(server, INFERENCE_KEY) as made:
        yield made


@pytest.fixture
def admin(server: Server) -> Iterator[httpx.Client]:
    """The operator; adapters loaded in a test are unloaded after it."""
    with client(server, ADMIN_KEY) as made:
        yield made
        for adapter in made.get("/v1/adapters").json()["data"]:
            if adapter["adapter"] != "static":
                made.delete(f"/v1/adapters/{adapter['adapter']}")


def client(server: Server, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=server.url, headers=headers, timeout=120)


def load(admin: httpx.Client, name: str, folder: Path | str, **more: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(folder), **more}
    return admin.post("/v1/load_lora_adapter", json=body)


def upload(http: httpx.Client, name: str, folder: Path, replace: bool = False) -> httpx.Response:
    """Both files of a folder as a multipart body."""
    files = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    query = {"replace": "true"} if replace else {}
    return http.post("/v1/adapters", params=query, data={"name": name}, files=files)


def say(http: httpx.Client, model: str, prompt: str = "The capital of France is") -> str:
    """A greedy completion; raises if the server answers an error."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = http.post("/v1/completions", json=body)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


def first_token(
    http: httpx.Client, model: str, prompt: str = "The capital of France is"
) -> tuple[str, float]:
    """A completion of one token, and its log probability, which the least of a foreign delta changes."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    answer = http.post("/v1/completions", json=body)
    answer.raise_for_status()
    choice = answer.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"][0]


def metric_samples(http: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples of /metrics."""
    return samples_of(http.get("/metrics").text)


def samples_of(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples of an exposition, read by prometheus_client's own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def descendants(pid: int) -> dict[int, bytes]:
    """The processes below one, with their command lines."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    found = {}
    for child in below - {pid}:
        with suppress(OSError):
            found[child] = Path(f"/proc/{child}/cmdline").read_bytes()
    return found
