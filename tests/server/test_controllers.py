"""The HTTP calls of the controllers that platforms run, replayed. The engine is a fake one.

Each class makes the calls of one controller and reads the answers as it does, from the source named in it.
A loop that converges may be repeated for ever, on either side of a restart.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from vllm.lora.request import LoRARequest

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.files import FoundSound
from safelora_vllm.gate.client import GateClient
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.worker.guard import WorkerGuard
from safelora_vllm.integration.worker.lora_manager import GuardedLoRAManager
from safelora_vllm.integration.worker.pool_counts import PoolCounts
from safelora_vllm.integration.worker.read_ahead import ReadAhead
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import PublishedStore
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY
from tests.server.fake_server import FakeServer, Place
from tests.tiny import Draft, lora

BASE = "aligned"


class ControllerError(Exception):
    """What makes a controller try again later."""


@dataclass
class ProductionStack:
    """vllm-project/production-stack, ``operator/internal/controller/loraadapter_controller.go`` (0c2b361).

    One key for all calls, from the secret that ``vllmApiKey`` names. Models with a parent are adapters.
    """

    http: httpx.Client
    wanted: dict[str, Path]

    def reconcile(self) -> None:
        models = self._send("GET", "/v1/models")["data"]
        registered = {model["id"] for model in models if model["parent"] is not None}
        for name, path in self.wanted.items():
            if name not in registered:
                self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def remove(self, name: str) -> None:
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _send(self, method: str, path: str, body: object = None) -> Any:
        answer = self.http.request(method, path, json=body)
        if answer.status_code == 400:
            error = answer.json()
            loaded = "has already been loaded" in error.get("message", "")
            if error.get("type") == "InvalidUserInput" and loaded:
                return None
        if answer.status_code != 200:
            raise ControllerError(answer.text)
        return answer.json() if method == "GET" else None


@dataclass
class Aibrix:
    """vllm-project/aibrix, ``pkg/controller/modeladapter/lora_client.go`` (0e92423).

    The key of ``additionalConfig.api-key``. Status 200 and 201 are success. Unloading ignores all errors.
    """

    http: httpx.Client
    wanted: dict[str, Path]

    def reconcile(self) -> None:
        listed = self.http.get("/v1/models")
        if listed.status_code != 200:
            raise ControllerError(listed.text)
        present = {model["id"] for model in listed.json()["data"]}
        for name, path in self.wanted.items():
            if name not in present:
                body = {"lora_name": name, "lora_path": str(path)}
                answer = self.http.post("/v1/load_lora_adapter", json=body)
                if answer.status_code not in (200, 201):
                    raise ControllerError(answer.text)

    def remove(self, name: str) -> None:
        self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


@dataclass
class LoraSyncer:
    """kubernetes-sigs/gateway-api-inference-extension, ``tools/dynamic-lora-sidecar/sidecar/sidecar.py``
    (5423be5).

    It sends no key. It asks for the health first, and sends a field that vLLM does not know.
    """

    http: httpx.Client
    wanted: dict[str, Path]

    def reconcile(self) -> None:
        if self.http.get("/health").status_code != 200:
            raise ControllerError("not healthy")
        for name, path in self.wanted.items():
            if name not in self._registered():
                body = {"lora_name": name, "lora_path": str(path), "base_model_name": BASE}
                self.http.post("/v1/load_lora_adapter", json=body).raise_for_status()

    def remove(self, name: str) -> None:
        if name in self._registered():
            self.http.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()

    def _registered(self) -> set[str]:
        return {model.get("id", "") for model in self.http.get("/v1/models").json()["data"]}


@dataclass
class KubeAI:
    """kubeai-project/kubeai, ``internal/vllmclient/client.go`` (a2d9b22).

    It sends no key, and loads at each reconciliation what the pod's labels do not name. Of errors it
    reads the nested object.
    """

    http: httpx.Client
    wanted: dict[str, Path]

    def reconcile(self) -> None:
        for name, path in self.wanted.items():
            self._post("load", {"lora_name": name, "lora_path": str(path)}, "already", "loaded")

    def remove(self, name: str) -> None:
        self._post("unload", {"lora_name": name}, "cannot be found")

    def _post(self, what: str, body: object, *forgiven: str) -> None:
        answer = self.http.post(f"/v1/{what}_lora_adapter", json=body)
        if answer.status_code > 299:
            error = answer.json()["error"]
            known = answer.status_code == 400 and error["type"] == "InvalidUserInput"
            if not (known and all(word in error["message"] for word in forgiven)):
                raise ControllerError(answer.text)


@dataclass
class Dynamo:
    """ai-dynamo/dynamo, ``components/src/dynamo/vllm/``: ``lora_lifecycle.py`` (93fe16e), ``lora_state.py``
    (231c36c).

    Its operator calls ``POST /v1/loras`` of Dynamo's own process, which downloads the adapter and gives the
    folder to ``engine_client.add_lora``. The names are kept there. Each request is given to the engine with
    the folder again. add_lora: what that does in a worker.
    """

    add_lora: Callable[[LoRARequest], Any]
    wanted: dict[str, Path]
    loaded: dict[str, LoRARequest] = field(default_factory=dict)

    def reconcile(self) -> None:
        for number, (name, path) in enumerate(self.wanted.items(), start=1):
            if name not in self.loaded:
                request = LoRARequest(name, number, str(path))
                try:
                    self.add_lora(request)
                except Exception as error:
                    raise ControllerError(f"Failed to add LoRA {name!r}: {error}") from error
                self.loaded[name] = request


CONTROLLERS = [ProductionStack, Aibrix, LoraSyncer, KubeAI]
KEYLESS = (LoraSyncer, KubeAI)
Controller = ProductionStack | Aibrix | LoraSyncer | KubeAI


@pytest.fixture
def guarded(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    with Place.start(cache, tmp_path, select="all") as place:
        yield place


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        f"lora-{seed}": Draft(tensors=lora(seed=seed)).write(tmp_path / f"lora-{seed}") for seed in range(3)
    }


def begin(place: Place, tmp_path: Path, static: Mapping[str, Path] | None = None) -> Any:
    """A pod's server."""
    socket = tmp_path / "admin" / "admin.sock"
    return place.server(static, INFERENCE_KEY, admin_socket=str(socket), adapter_roots=[str(tmp_path)])


@contextmanager
def connected(
    kind: type[Controller], server: FakeServer, tmp_path: Path, wanted: dict[str, Path]
) -> Iterator[Controller]:
    """A controller with the way in that its recipe gives it: an admin key, or the admin socket."""
    if kind not in KEYLESS:
        yield kind(server.client(ADMIN_KEY), wanted)
        return
    socket = httpx.HTTPTransport(uds=str(tmp_path / "admin" / "admin.sock"))
    with httpx.Client(transport=socket, base_url="http://localhost") as http:
        yield kind(http, wanted)


def rewrite(folder: Path, seed: int) -> None:
    shutil.rmtree(folder)
    Draft(tensors=lora(seed=seed)).write(folder)


def served(server: FakeServer) -> set[str]:
    models = server.client(INFERENCE_KEY).get("/v1/models").json()["data"]
    return {model["id"] for model in models if model["parent"]}


def changes(server: FakeServer) -> list[tuple[str, str]]:
    entries = AuditLog(server.store / "audit").read()
    return [(entry["action"], entry["adapter"]) for entry in entries]


def withdraw(server: FakeServer, name: str) -> None:
    registry = server.app.state.safelora.registry
    registry[name] = dataclasses.replace(registry[name], served=None, problem=StoreUnavailable("damaged"))


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_it_converges_heals_and_either_side_may_restart(
    kind: type[Controller], guarded: Place, tmp_path: Path, folders: dict[str, Path]
) -> None:
    done = [("load", name) for name in folders]
    with begin(guarded, tmp_path) as server:
        with connected(kind, server, tmp_path, folders) as controller:
            controller.reconcile()
            assert served(server) == set(folders) and changes(server) == done
            controller.reconcile()
            assert served(server) == set(folders) and changes(server) == done, "nothing more is done"
            withdraw(server, "lora-1")
            assert served(server) == {"lora-0", "lora-2"}
            controller.reconcile()
            assert served(server) == set(folders), "what was lost is back"
        with connected(kind, server, tmp_path, folders) as controller:  # it restarts
            controller.reconcile()
    with begin(guarded, tmp_path) as server:  # the server restarts, with its store
        assert served(server) == set(folders)
        with connected(kind, server, tmp_path, folders) as controller:
            controller.reconcile()
        assert changes(server) == done


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_removal_and_new_content(
    kind: type[Controller], guarded: Place, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """As in vLLM, a name keeps its content until it is unloaded, and the controller sees no error."""

    def digest() -> str:
        return str(server.client(ADMIN_KEY).get("/v1/adapters/lora-0").json()["digest"])

    with begin(guarded, tmp_path) as server, connected(kind, server, tmp_path, folders) as controller:
        controller.reconcile()
        before = digest()
        rewrite(folders["lora-0"], 9)
        controller.reconcile()
        assert digest() == before
        controller.remove("lora-0")
        assert served(server) == {"lora-1", "lora-2"}
        controller.reconcile()
        assert digest() != before
        if kind in (ProductionStack, KubeAI):  # a 404, as in vLLM: these two want it to be there
            with pytest.raises(ControllerError, match="cannot be found"):
                controller.remove("none")
        else:
            controller.remove("none")


def test_pods_with_a_store_each_do_not_undo_each_other(
    guarded: Place, cache: ProjectorCache, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """A controller that takes an adapter off one pod leaves it on the other."""
    (tmp_path / "pod").mkdir()
    with (
        Place.start(cache, tmp_path / "pod", select="all") as second,
        begin(guarded, tmp_path) as one, second.server({}, INFERENCE_KEY) as two,
    ):  # fmt: skip
        pods = [ProductionStack(server.client(ADMIN_KEY), folders) for server in (one, two)]
        for pod in pods:
            pod.reconcile()
        pods[0].remove("lora-0")
        assert (served(one), served(two)) == (set(folders) - {"lora-0"}, set(folders))


def test_a_shared_or_a_kept_store_is_not_a_pods(
    guarded: Place, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """Why the recipe says: one store for each pod, which ends with it."""
    with begin(guarded, tmp_path) as one, guarded.server({}, INFERENCE_KEY) as two:
        pods = [ProductionStack(server.client(ADMIN_KEY), folders) for server in (one, two)]
        pods[0].reconcile()
        assert served(two) == set(folders), "one store is one for all"
        pods[0].remove("lora-0")
        assert "lora-0" not in served(two)
        pods[1].reconcile()  # this one wants it
        assert "lora-0" in served(one)
    with begin(guarded, tmp_path) as again:  # no resource is left, and nobody loads anything
        ProductionStack(again.client(ADMIN_KEY), {}).reconcile()
        assert served(again) == set(folders)


@pytest.mark.parametrize("kind", [ProductionStack, Aibrix])
def test_an_inference_key_is_not_enough(
    kind: Callable[..., Controller], guarded: Place, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """Nor does a refused adapter pass because a controller insists."""
    with begin(guarded, tmp_path) as server:
        with pytest.raises(ControllerError, match="needs an admin key"):
            kind(server.client(INFERENCE_KEY), folders).reconcile()
        (folders["lora-0"] / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
        for _ in range(3):
            with pytest.raises(ControllerError, match="dora"):
                kind(server.client(ADMIN_KEY), {"lora-0": folders["lora-0"]}).reconcile()
        assert served(server) == set()


def test_kserve_gives_adapters_on_the_command_line(
    guarded: Place, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """kserve/kserve#5317: ``--lora-modules NAME=/mnt/lora/NAME``, from an init container. No HTTP calls."""
    for _ in range(2):  # and after a restart
        with begin(guarded, tmp_path, folders) as server:
            assert served(server) == set(folders)
            assert {request.lora_path[:11] for request in server.engine.loaded} == {"safelora://"}
            listed = server.client(INFERENCE_KEY).get("/v1/models").json()["data"]
            assert all(model["root"].startswith("safelora://") for model in listed if model["parent"])
    with begin(guarded, tmp_path, {"lora-0": folders["lora-0"]}) as server:
        assert served(server) == {"lora-0"}, "what the command line does not name any more is gone"


def worker(place: Place) -> GuardedLoRAManager:
    """A worker's LoRA manager and its way to the gate, without a model."""
    guard: WorkerGuard = object.__new__(WorkerGuard)
    guard._store, guard._client = PublishedStore(place.store), GateClient(place.gate.socket)
    guard._accepted, guard._taken, guard.lost = {}, FoundSound(), set()
    guard._settings = ServerSettings("unused", str(place.store))
    guard.state = guard._client.state()
    made: GuardedLoRAManager = object.__new__(GuardedLoRAManager)
    made.guard, made.counts, made._in_step = guard, PoolCounts(0), False
    made.read_ahead = ReadAhead(made._read, torch.device("cpu"))
    return made


def test_dynamo_loads_in_the_process(
    guarded: Place, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapters pass the gate in the worker. vLLM reads published copies, never Dynamo's folders."""
    read: list[Path] = []
    monkeypatch.setattr(seams, "load_published", lambda _, asked: read.append(Path(asked.lora_path)))
    zeros = SimpleNamespace(clone=lambda _: pytest.fail("the aligned model answers alone"))
    monkeypatch.setattr(GuardedLoRAManager, "_zeros", zeros, raising=False)
    pool = worker(guarded)
    controller = Dynamo(pool._load_adapter, folders)
    for _ in range(2):
        controller.reconcile()
    published = guarded.store / "published"
    assert len(set(read)) == len(read) == 3 and {copy.parent for copy in read} == {published}
    rewrite(folders["lora-0"], 9)
    pool._in_step = True  # it was evicted, and a request names Dynamo's folder again
    pool._load_adapter(controller.loaded["lora-0"])
    assert read[3] == read[0], "what passed the gate under this name, id and path"
    Dynamo(worker(guarded)._load_adapter, folders).reconcile()  # the worker restarts
    assert read[4] not in read[:4] and read[5:] == read[1:3], "the new content passed the gate"
    (folders["lora-1"] / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    with pytest.raises(ControllerError, match=r"Failed to add LoRA 'lora-1'.*dora"):
        Dynamo(worker(guarded)._load_adapter, folders).reconcile()
