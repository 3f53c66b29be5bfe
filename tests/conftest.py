"""What the fast tests share: one tiny model pair and its projector caches, built once."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from safelora_vllm.gate.admit import GateSettings
    from safelora_vllm.projectors.cache import ProjectorCache
    from safelora_vllm.store import PublishedStore
    from tests.tiny import Pair

# No deadline: the machine is shared. Derandomised: the same run everywhere, no example database.
settings.register_profile("fast", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("fast")


# Imports at the top of a test file that only the extras for a server install.
NEEDS_SERVER = re.compile(
    r"^(from|import) (vllm|fastapi|starlette|pydantic|safelora_vllm\.(integration|settings)|tests\.fuzz)\b",
    re.M,
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without vLLM or fastapi, leave out the test files that need them."""
    if _has_server() or not re.fullmatch(r"test_.*\.py", collection_path.name):
        return None
    in_server = collection_path.parent.name == "server"
    return True if in_server or NEEDS_SERVER.search(collection_path.read_text()) else None


@lru_cache
def _has_server() -> bool:
    try:
        return all(importlib.util.find_spec(name) for name in ("vllm", "fastapi"))
    except ImportError:
        return False


# The files whose tests use the one server of the session, which one process starts.
ONE_SERVER = (
    "test_corpus_live", "test_loading", "test_metrics", "test_monitoring_live", "test_openapi",
    "test_platforms", "test_routes", "test_second_opinion_live", "test_survival", "test_tenants",
    "test_uploads", "test_weights",
)  # fmt: skip
# What takes longest begins first, so that the processes end together.
LONGEST = (
    *ONE_SERVER, "test_many_servers", "test_fail_closed", "test_parallel", "test_families",
    "test_routes_closed", "test_safety_benchmark", "test_offline", "test_slots", "test_cpu_engine",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which several processes take the files."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()) and item.path.stem not in ONE_SERVER:
            raise pytest.UsageError(
                f"{item.path.name} uses the fixture 'server', and another process may have started it "
                "already: add the file to ONE_SERVER in tests/conftest.py"
            )

    def place(item: pytest.Item) -> int:
        known = item.path.stem in LONGEST
        return LONGEST.index(item.path.stem) if known else len(LONGEST) + (item.path.parent.name != "server")

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process does a file, in the order above, and one does all files with the one server."""
    from xdist.scheduler import LoadFileScheduling

    class FileByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "server" if Path(file).stem in ONE_SERVER else file

    config.option.loadscopereorder = False
    return FileByFile(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Names of files may be logged that are no UTF-8. xdist cannot send those to its main process."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On a shared machine torch's threads wait for each other many times longer than they compute."""
    import torch

    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Another device than the CPU for what the gate computes, where there is one: ``--device cuda``."""
    parser.addoption("--device", default="cpu", help="where adapters are judged (default: cpu)")


@pytest.fixture(scope="session", autouse=True)
def judged_on(request: pytest.FixtureRequest) -> Generator[None]:
    """Tests that name no other device than the CPU run on the one of ``--device``."""
    name = request.config.getoption("--device")
    if name == "cpu":
        yield
        return
    import torch

    from safelora_vllm.gate import admit
    from safelora_vllm.methods import judge
    from safelora_vllm.projectors.cache import ProjectorCache

    wanted, inner, load = torch.device(name), judge.judge, ProjectorCache.load

    def judge_there(weights: Any, cache: Any, policy: Any, device: torch.device, dtype: torch.dtype) -> Any:
        return inner(weights, cache, policy, wanted if device.type == "cpu" else device, dtype)

    def load_there(cache: ProjectorCache, device: str | torch.device, *args: Any, **kwargs: Any) -> None:
        load(cache, wanted if str(device) == "cpu" else device, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "judge", judge_there)
        patch.setattr(admit, "judge", judge_there)
        patch.setattr(ProjectorCache, "load", load_there)
        patch.setattr(judge, "_DEVICE_BYTES", judge._CPU_BYTES)
        yield


@pytest.fixture(autouse=True)
def logs_are_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By pytest, which looks at the root logger. Once vLLM is imported, its logger keeps all to itself."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    gate = logging.getLogger("vllm.safelora.gate")
    level = gate.level
    yield
    gate.setLevel(level)  # a process of `project --all` keeps it quiet, and tests run its code here


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A base and an aligned checkpoint; read only."""
    from tests.tiny import write_pair

    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def build_cache(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(dtype, form) → the pair's projector cache folder, each built once; read only."""
    from safelora_vllm.projectors.build import BuildOptions, build

    root = tmp_path_factory.mktemp("caches")

    def folder(dtype: str, form: str) -> Path:
        out = root / f"{dtype}-{form}"
        if not out.exists():
            build(pair.base, pair.aligned, out, BuildOptions(exact=True, dtype=dtype, form=form))
        return out

    return folder


@pytest.fixture(scope="session")
def cache(build_cache: Callable[[str, str], Path]) -> ProjectorCache:
    """The float32 cache in the automatic form."""
    from safelora_vllm.projectors.cache import ProjectorCache

    return ProjectorCache(build_cache("float32", "auto"))


@pytest.fixture(scope="session")
def thin(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> ProjectorCache:
    """A cache without Ĉ and V, with the energies of `cache`."""
    from safelora_vllm.projectors.build import BuildOptions, build
    from safelora_vllm.projectors.cache import ProjectorCache

    options, out = BuildOptions(max_energy=0.95), tmp_path_factory.mktemp("thin") / "cache"
    return ProjectorCache(build(pair.base, pair.aligned, out, options))


@pytest.fixture(scope="session")
def thin_at(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], ProjectorCache]:
    """The pair's thin cache up to an energy, each built once."""
    from safelora_vllm.projectors.build import BuildOptions, build
    from safelora_vllm.projectors.cache import ProjectorCache

    root = tmp_path_factory.mktemp("thin-at")

    def cache(energy: float) -> ProjectorCache:
        if not (out := root / str(energy)).exists():
            build(pair.base, pair.aligned, out, BuildOptions(max_energy=energy))
        return ProjectorCache(out)

    return cache


@pytest.fixture(scope="session")
def approximate_at(
    pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[float, float], ProjectorCache]:
    """(energy, convergence) → the pair's thin cache, of approximate directions as a large model's is.

    Where its modules are not flat; see `subspace.CONVERGED` for the convergence. Each is built once.
    """
    from functools import partial

    from safelora_vllm.projectors import build as build_module
    from safelora_vllm.projectors import module as one_module
    from safelora_vllm.projectors.cache import ProjectorCache

    root = tmp_path_factory.mktemp("approximate-at")

    def cache(energy: float, converged: float) -> ProjectorCache:
        if not (out := root / f"{energy}-{converged}").exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(build_module, "_DOMINANT_FROM", 1)
                patch.setattr(one_module, "dominant", partial(one_module.dominant, converged=converged))
                options = build_module.BuildOptions(max_energy=energy)
                build_module.build(pair.base, pair.aligned, out, options)
        return ProjectorCache(out)

    return cache


@pytest.fixture(scope="session")
def enlarging(tmp_path_factory: pytest.TempPathFactory) -> ProjectorCache:
    """A float32 cache of a pair whose ‖V‖ is far above 1: along V's first directions Ĉ enlarges."""
    from safelora_vllm.projectors.build import BuildOptions, build
    from safelora_vllm.projectors.cache import ProjectorCache
    from tests.tiny import write_pair

    root = tmp_path_factory.mktemp("enlarging")
    pair = write_pair(root, step=0.4)
    return ProjectorCache(
        build(pair.base, pair.aligned, root / "cache", BuildOptions(exact=True, dtype="float32"))
    )


@pytest.fixture
def gate(cache: ProjectorCache) -> GateSettings:
    """Settings of a gate with the default policy."""
    from safelora_vllm.gate.admit import GateSettings
    from safelora_vllm.policy import Policy

    return GateSettings(cache, Policy(method="safe-lora"))


@pytest.fixture
def store(tmp_path: Path) -> PublishedStore:
    """An empty store of published adapters."""
    from safelora_vllm.store import PublishedStore

    return PublishedStore(tmp_path / "store")
