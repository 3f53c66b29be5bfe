"""What ``safelora-vllm serve`` adds to vLLM's options and environment, and the order of its steps."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from safelora_vllm.cli.main import main
from safelora_vllm.errors import GuardError, KeysError, PolicyError, ProjectorCacheError, UsageError
from safelora_vllm.integration import launch
from safelora_vllm.integration.launch import allowed_plugins, guarded_options, serve
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ADMIN_KEY, METRICS_KEY, ServerSettings

SETTINGS = ServerSettings("/cache", "/store")
EXTENSION = ["--worker-extension-cls", "safelora_vllm.integration.required.Guard"]


def section(options: list[str]) -> Any:
    """The value of ``--additional-config``, which is given once."""
    assert options.count("--additional-config") == 1
    return json.loads(options[options.index("--additional-config") + 1])


def test_the_guards_options_are_added() -> None:
    guarded = guarded_options(SETTINGS, ["--port", "1"])
    assert guarded[:2] == ["--port", "1"]
    assert section(guarded) == SETTINGS.to_section()
    assert guarded[4:] == ["--enable-lora", *EXTENSION]


def test_options_of_the_user_are_not_given_twice() -> None:
    guarded = guarded_options(SETTINGS, ["--enable-lora", "--port", "1"])
    assert guarded.count("--enable-lora") == 1


@pytest.mark.parametrize(
    "own", [["--worker-extension-cls", "x.Y"], ["--worker-extension-cls=x.Y"], ["--worker_extension_cls=x.Y"]]
)
def test_an_extension_class_of_the_user_is_kept(own: list[str]) -> None:
    guarded = guarded_options(SETTINGS, own)
    assert EXTENSION[1] not in guarded and guarded[: len(own)] == own


@pytest.mark.parametrize(
    "form", [["--additional-config", "{}"], ["--additional-config={}"], ["--additional_config={}"]], ids=str
)
def test_an_additional_config_of_the_user_is_kept(form: list[str]) -> None:
    own = json.dumps({"other": {"a": "=1"}, "safelora": {"policy": {"mode": "report-only"}}})
    given = [part.replace("{}", own) for part in form]
    guarded = guarded_options(SETTINGS, [*given, "--port", "1"])
    assert guarded[:2] == ["--port", "1"]
    assert section(guarded) == {"other": {"a": "=1"}, **SETTINGS.to_section()}, "but not a section of ours"


@pytest.mark.parametrize(
    "given", [["--additional-config", "{"], ["--additional-config=5"], ["--additional-config"]]
)
def test_what_is_no_additional_config(given: list[str]) -> None:
    with pytest.raises(UsageError, match="--additional-config is not a JSON object"):
        guarded_options(SETTINGS, given)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("other", "safelora,other"), ("other,safelora", "safelora,other"), ("", "safelora"),
        (",other,,", "safelora,other"),
    ],
)  # fmt: skip
def test_plugins_that_the_user_names_are_those(
    named: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "entry_points", lambda **_: pytest.fail("the user has said which"))
    monkeypatch.setenv("VLLM_PLUGINS", named)
    assert allowed_plugins() == expected


def test_plugins_that_vllm_would_load_by_itself_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM loads nothing else once some are named. Endpoint plugins it never loads by itself."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    found = {
        "vllm.general_plugins": ["safelora", "a"], "vllm.platform_plugins": ["b"],
        "vllm.io_processor_plugins": ["c"], "vllm.stat_logger_plugins": ["d", "a"],
        "vllm.endpoint_plugins": ["e"],
    }  # fmt: skip
    monkeypatch.setattr(
        launch, "entry_points", lambda group: [SimpleNamespace(name=name) for name in found[group]]
    )
    assert allowed_plugins() == "safelora,a,b,c,d"


class Vllm:
    """vLLM's serve command, which notes what it is asked, in the place of vLLM."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self.args = argparse.Namespace()
        self.ends: Callable[[], None] = lambda: None
        self.available = 8 * 2**30
        self.cpu = True
        vllm = self

        class ServeSubcommand:
            def subparser_init(self, subparsers: Any) -> None:
                parser = subparsers.add_parser("serve")
                parser.add_argument("model")
                for flag in ("--enable-lora", "--grpc"):
                    parser.add_argument(flag, dest=flag[2:].replace("-", "_"), action="store_true")
                for flag in ("--additional-config", "--worker-extension-cls", "--host"):
                    parser.add_argument(flag)
                parser.add_argument("--port", type=int, default=0)
                parser.add_argument("--kv-cache-memory-bytes", type=int)
                parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)

            def validate(self, args: argparse.Namespace) -> None:
                vllm.steps.append("validate")
                assert args.kv_cache_memory_bytes is not None or not vllm.cpu

            def cmd(self, args: argparse.Namespace) -> None:
                vllm.steps.append("cmd")
                vllm.args = args
                vllm.ends()

        def module(name: str, **names: object) -> None:
            made = ModuleType(name)
            vars(made).update(names)
            monkeypatch.setitem(sys.modules, name, made)

        module("vllm")
        module("vllm.entrypoints")
        module("vllm.entrypoints.cli")
        module("vllm.entrypoints.cli.serve", ServeSubcommand=ServeSubcommand)
        module("vllm.utils")
        module("vllm.utils.argparse_utils", FlexibleArgumentParser=argparse.ArgumentParser)
        module("vllm.engine")
        module("vllm.engine.arg_utils", EngineArgs=SimpleNamespace(gpu_memory_utilization=0.92))
        module("vllm.platforms", current_platform=SimpleNamespace(is_cpu=lambda: self.cpu))
        memory = SimpleNamespace(available=self.available, total=100 * self.available)
        module("psutil", virtual_memory=lambda: memory)
        monkeypatch.setattr(launch.checks, "check", lambda side: self.steps.append(f"check {side}"))
        monkeypatch.setattr(launch, "remove_leftovers", lambda: self.steps.append("leftovers"))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """With an environment that says nothing, and that is as before in the end."""
    for name in (
        "VLLM_CPU_KVCACHE_SPACE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_USE_RUST_FRONTEND",
        "SAFELORA_ADMIN_KEY_MADE", METRICS_KEY, ADMIN_KEY, "VLLM_PLUGINS",
    ):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "new_admin_key", lambda: "made for this run")
    return Vllm(monkeypatch)


@pytest.fixture
def settings(cache: ProjectorCache, tmp_path: Path) -> ServerSettings:
    return ServerSettings(str(cache.folder), str(tmp_path / "store"), trust_served_model=True)


def test_the_steps_of_a_start(
    vllm: Vllm, settings: ServerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    serve("MODEL", settings, ["--host", "127.0.0.1"])
    assert vllm.steps == ["check command", "check server", "validate", "cmd", "leftovers"]
    assert (vllm.args.model, vllm.args.host, vllm.args.enable_lora) == ("MODEL", "127.0.0.1", True)
    assert json.loads(vllm.args.additional_config) == settings.to_section()
    assert vllm.args.worker_extension_cls == EXTENSION[1]
    assert vllm.args.kv_cache_memory_bytes == 2 * 2**30
    assert "the KV cache of each worker takes 2.0 GiB of memory" in capsys.readouterr().out
    assert os.environ[ADMIN_KEY] == "made for this run"
    assert os.environ["VLLM_PLUGINS"].split(",")[0] == "safelora"


def test_a_machine_with_a_gpu_keeps_vllms_memory(vllm: Vllm, settings: ServerSettings) -> None:
    vllm.cpu = False
    serve("MODEL", settings, [])
    assert vllm.args.kv_cache_memory_bytes is None


def test_a_server_that_fails_leaves_no_folder_of_its_gate(vllm: Vllm, settings: ServerSettings) -> None:
    def fails() -> None:
        raise SystemExit(1)

    vllm.ends = fails
    with pytest.raises(SystemExit):
        serve("MODEL", settings, [])
    assert vllm.steps[-1] == "leftovers"


def test_a_port_in_use_stops_the_start(vllm: Vllm, settings: ServerSettings) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="in use"):
            serve("MODEL", settings, ["--host", "127.0.0.1", "--port", str(other.getsockname()[1])])
    assert "cmd" not in vllm.steps


def test_a_front_end_without_our_routes_stops_the_start(vllm: Vllm, settings: ServerSettings) -> None:
    with pytest.raises(GuardError, match="--grpc"):
        serve("MODEL", settings, ["--grpc"])
    assert "cmd" not in vllm.steps


def test_what_is_checked_before_vllm_is_looked_at(
    vllm: Vllm, settings: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            serve("MODEL", replace(settings, **changes), [])
        assert vllm.steps == []

    refused(UsageError, "GET /health has its access already", route_access={"GET /health": "users"})
    refused(PolicyError, "max_energy", policy={"energy": 0.9999})
    refused(KeysError, "none.toml", keys=str(tmp_path / "none.toml"))
    refused(ProjectorCacheError, "none", projectors=str(tmp_path / "none"))

    def other(_: ProjectorCache, model: str, quick: bool) -> None:
        assert (model, quick) == ("MODEL", True)
        raise ProjectorCacheError("not a copy")

    monkeypatch.setattr(launch, "check_served_model", other)
    refused(ProjectorCacheError, "not a copy", trust_served_model=False)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    serve("MODEL", settings, [])
    assert vllm.steps and os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0", "accepted, and switched off"


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("options", [["--revision", "v2"], ["--revision=v2", "--dtype=float32"], []])
def test_the_revision_that_is_served_is_the_one_that_is_compared(
    options: list[str], settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would be downloaded whole, and perhaps be refused."""

    def compared(_: ProjectorCache, model: str, **__: bool) -> None:
        raise ProjectorCacheError(f"compared: {model}.")

    monkeypatch.setattr(launch, "check_served_model", compared)
    with pytest.raises(ProjectorCacheError, match="org/model@v2." if options else "org/model."):
        serve("org/model", replace(settings, trust_served_model=False), options)


@pytest.mark.usefixtures("vllm")
def test_an_admin_key_is_made_where_none_is_given(
    settings: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keys = tmp_path / "keys.toml"
    keys.touch(0o600)
    with_keys = replace(settings, keys=str(keys))
    keys.write_text('[tenants.acme.keys]\nci = "a long secret of acme"\n')
    serve("MODEL", with_keys, [])
    assert ADMIN_KEY not in os.environ
    missing = f"safelora: no admin key, neither in {keys} nor in {ADMIN_KEY}"
    assert missing in capsys.readouterr().out
    keys.write_text('[admin]\nops = "a long secret of ops"\n')
    serve("MODEL", with_keys, [])
    assert ADMIN_KEY not in os.environ
    monkeypatch.setenv(METRICS_KEY, "a long secret of ops")
    with pytest.raises(KeysError):  # one key for two callers
        serve("MODEL", with_keys, [])
    monkeypatch.delenv(METRICS_KEY)
    monkeypatch.setenv(ADMIN_KEY, "an admin key of this test")
    keys.write_text("")
    serve("MODEL", with_keys, [])
    serve("MODEL", settings, [])
    assert os.environ[ADMIN_KEY] == "an admin key of this test"
    assert missing not in capsys.readouterr().out


def test_a_vllm_that_cannot_be_imported_is_said_to_be(
    vllm: Vllm, settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"vLLM cannot be imported .* pip install '\.\[vllm\]'"):
        serve("MODEL", settings, [])
    assert vllm.steps == []


def test_the_value_of_a_vllm_option_is_not_taken_for_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--host", "127.0.0.1"], ["--host", "127.0.0.1", "M"], ["--enforce-eager", "M"]):
        assert main(["serve", "--projectors", "P", *words]) == 2
        error = capsys.readouterr().err
        assert f"{words[1]!r} follows vLLM's option {words[0]}" in error and "serve MODEL" in error
    served: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(launch, "serve", lambda model, _, options: served.append((model, options)))
    assert main(["serve", "--projectors", "P", "--port=1", "M"]) == 0 and served.pop() == ("M", ["--port=1"])
    assert main(["serve", "serve", "--projectors", "P", "--enforce-eager"]) == 0
    assert served.pop() == ("serve", ["--enforce-eager"])
    for words in (["M", "--host", "127.0.0.1"], ["--projectors", "P", "M", "--host", "127.0.0.1"]):
        assert main(["serve", *words, "--projectors", "P"]) == 0
    assert served == [("M", ["--host", "127.0.0.1"])] * 2
