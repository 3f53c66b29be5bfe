"""What ``--additional-config`` may say, and what holds where nothing is said; where settings have
to be named besides."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.adapters.read import Limits
from safelora_vllm.cli.main import _parser, main
from safelora_vllm.cli.options import size, size_text
from safelora_vllm.cli.serve import _settings
from safelora_vllm.errors import GuardError, PolicyError
from safelora_vllm.gate.protocol import GateConfig
from safelora_vllm.settings import FIELDS, ServerSettings, new_admin_key
from safelora_vllm.store.layout import default_root

# Each option of ``serve`` that is a setting, with a value; the other settings stand in the section only.
OPTIONS: dict[str, tuple[list[str], Any]] = {
    "projectors": (["--projectors", "/p"], "/p"),
    "store": (["--adapter-store", "/s"], "/s"),
    "store_mirror": (["--store-mirror", "s3://bucket/x"], "s3://bucket/x"),
    "trust_served_model": (["--trust-served-model"], True),
    "max_adapter_bytes": (["--max-adapter-bytes", "1KB"], 1000),
    "store_bytes": (["--store-bytes", "2KB"], 2000),
    "keys": (["--keys", "/k"], "/k"),
    "adapter_roots": (["--adapter-root", "/a", "--adapter-root", "/b"], ["/a", "/b"]),
    "gate_device": (["--gate-device", "cuda:1"], "cuda:1"),
    "projector_memory": (["--projector-memory", "3KB"], 3000),
    "projector_host_memory": (["--projector-host-memory", "4KB", "--projector-memory", "3KB"], 4000),
    "remote_sources": (
        ["--remote-source", "s3://aaa", "--remote-source", "gs://bbb/c"],
        ["s3://aaa", "gs://bbb/c"],
    ),
    "remote_endpoints": (["--remote-endpoint", "http://minio:9000"], ["http://minio:9000"]),
    "concurrent_uploads": (["--concurrent-uploads", "3"], 3),
    "allow_hub": (["--allow-hub"], True),
    "admin_socket": (["--admin-socket", "/x/y"], "/x/y"),
    "audit_stdout": (["--audit-stdout"], True),
    "exam": (["--exam", "enforce"], "enforce"),
    "exam_threshold": (["--exam-threshold", "0.05"], 0.05),
    "ladder": (["--ladder", "input-removal:0.1,safe-lora"], "input-removal:0.1,safe-lora"),
    "exam_probes": (["--exam-probes", "/x/p.jsonl"], "/x/p.jsonl"),
    "exam_every": (["--exam-every=24h"], "24h"),
    "exam_languages": (["--exam-languages=en,de"], "en,de"),
    "second_opinion": (["--second-opinion", "16"], 16),
    "private_docs": (["--private-docs"], True),
    "no_page": (["--no-page"], True),
    "tenant_reports": (["--tenant-reports", "summary"], "summary"),
    "route_access": (["--route-access", "GET /x=users"], {"GET /x": "users"}),
}
SECTION_ONLY = {"policy"}

GIB = 1024**3
# Golden: a change here changes what servers do that are started with the same command as before.
SERVER: dict[str, Any] = {
    "store_mirror": None, "policy": {}, "trust_served_model": False, "gate_device": "worker",
    "projector_memory": None,
    "projector_host_memory": 0, "max_adapter_bytes": 2 * GIB, "store_bytes": None, "keys": None,
    "adapter_roots": [], "remote_sources": [], "remote_endpoints": [],
    "concurrent_uploads": 8, "allow_hub": False, "admin_socket": None, "private_docs": False,
    "no_page": False, "tenant_reports": "full", "audit_stdout": False, "route_access": {},
    "exam": "off", "exam_threshold": 0.02, "ladder": None, "exam_probes": None, "exam_every": None,
    "exam_languages": "en", "second_opinion": 0,
}  # fmt: skip
GATE: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_rank": 512, "target_modules": (),
    "niceness": 10,
}  # fmt: skip
LIMITS = {
    "config_bytes": 1024**2, "weights_bytes": 2 * GIB, "header_bytes": 8 * 1024**2, "max_rank": 512,
    "target_modules": (),
}  # fmt: skip


def test_all_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    store = str(tmp_path / "safelora-vllm")
    server = {"projectors": "p", "store": store, **SERVER}
    assert dataclasses.asdict(ServerSettings("p")) == server
    section = {"safelora": {"projectors": "p"}}
    assert dataclasses.asdict(ServerSettings.from_additional_config(section)) == server
    gate = GateConfig("k", "m", ServerSettings("p"))
    assert dataclasses.asdict(gate) == {"socket": "k", "model": "m", "settings": server, **GATE}
    assert dataclasses.asdict(Limits()) == LIMITS
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ServerSettings("p").store == str(tmp_path / ".local/share/safelora-vllm")


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ([], {}),
        (["--allow-hub"], {"allow_hub": True}),
        (["--private-docs"], {"private_docs": True}),
        (["--no-page"], {"no_page": True}),
        (["--tenant-reports=summary"], {"tenant_reports": "summary"}),
        (["--route-access", "GET /x = users"], {"route_access": {"GET /x": "users"}}),
        (["--trust-served-model"], {"trust_served_model": True}),
        (["--adapter-root", "a", "--adapter-root=b"], {"adapter_roots": ["HERE/a", "HERE/b"]}),
        (["--keys", "k.toml"], {"keys": "HERE/k.toml"}),
        (["--adapter-store", "s"], {"store": "HERE/s"}),
        (["--max-adapter-bytes=40MB"], {"max_adapter_bytes": 40_000_000}),
        (["--store-bytes=1GiB"], {"store_bytes": GIB}),
        (["--concurrent-uploads=2"], {"concurrent_uploads": 2}),
        (["--gate-device=cpu"], {"gate_device": "cpu"}),
        (["--projector-memory=1GiB"], {"projector_memory": GIB}),
        (
            ["--projector-memory=1GiB", "--projector-host-memory=2GiB"],
            {"projector_memory": GIB, "projector_host_memory": 2 * GIB},
        ),
        (["--energy=0.3", "--mode=report-only"], {"policy": {"energy": 0.3, "mode": "report-only"}}),
    ],
    ids=str,
)
def test_an_option_of_the_command_changes_its_setting_only(
    options: list[str], changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[ServerSettings] = []
    monkeypatch.setattr(
        "safelora_vllm.integration.launch.serve", lambda _model, settings, _options: started.append(settings)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert main(["serve", "model", "--projectors", "p", *options]) == 0
    expected = {"projectors": "HERE/p", "store": "HERE/data/safelora-vllm", **SERVER, **changed}
    found = json.loads(json.dumps(dataclasses.asdict(started[0])).replace(str(tmp_path), "HERE"))
    assert found == expected


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"projectors": 5}, "projectors"), ({"policy": None}, "policy"), ({"policy": []}, "policy"),
        ({"projector_memory": "x"}, "projector_memory"), ({"projector_memory": True}, "projector_memory"),
        ({"projector_host_memory": None}, "projector_host_memory"),
        ({"allow_hub": "no"}, "allow_hub"), ({"adapter_roots": "/data"}, "adapter_roots"),
        ({"nonsense": 1}, "nonsense"), ({"private_docs": 1}, "private_docs"),
        ({"gate_device": 0}, "gate_device"),
        ({"route_access": {"GET /x": 1}}, "route_access"),
        ({"remote_sources": ["/srv"]}, "not a valid prefix of remote sources"),
        ({"remote_endpoints": ["minio:9000"]}, "not a valid endpoint"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(GuardError, match=named):
        ServerSettings.from_additional_config({"safelora": {"projectors": "p", **values}})


@pytest.mark.parametrize("device", ["worker", "cpu", "cuda:0", "xpu:12"])
def test_devices_of_the_gate(device: str) -> None:
    assert ServerSettings("p", gate_device=device).gate_device == device


@pytest.mark.parametrize("device", ["", "gpu", "cuda", "cuda:", "cuda:x", "CUDA:0", "cpu:", " cpu", "cpu\n"])
def test_what_is_no_device_of_the_gate(device: str) -> None:
    with pytest.raises(GuardError, match=r"^gate_device is .* expected worker, cpu, or a device"):
        ServerSettings("p", gate_device=device)


def test_memory_that_cannot_be_meant() -> None:
    for name in ("projector_memory", "projector_host_memory"):
        with pytest.raises(GuardError, match=f"^{name} is -1: expected bytes, 0 or more"):
            ServerSettings("p", **{"projector_memory": 0, name: -1})
    with pytest.raises(GuardError, match=r"^projector_host_memory has no effect without projector_memory"):
        ServerSettings("p", projector_host_memory=1)
    assert ServerSettings("p", projector_memory=0, projector_host_memory=1).projector_host_memory == 1


@pytest.mark.parametrize("text", ["GET /x", "users"])
def test_an_access_without_its_half_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "model", "--projectors", "p", "--route-access", text])
    assert ended.value.code == 2 and "expected 'METHOD /path=WHO'" in capsys.readouterr().err


def test_keys_in_options_are_left_to_the_servers_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings are shown in logs; keys are not among them."""
    monkeypatch.setattr("safelora_vllm.integration.launch.serve", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for option, variable in (("admin-api", "SAFELORA_ADMIN_API_KEY"), ("metrics", "SAFELORA_METRICS_KEY")):
        monkeypatch.delenv(variable, raising=False)
        assert main(["serve", "model", "--projectors", "p"]) == 0 and variable not in os.environ
        assert main(["serve", "model", "--projectors", "p", f"--{option}-key=the key"]) == 0
        assert os.environ[variable] == "the key"


def test_all_that_is_wrong_is_named_at_once() -> None:
    values = {"projectors": "p", "store_bytes": "x", "allow_hub": 1}
    with pytest.raises(GuardError) as error:
        ServerSettings.from_additional_config({"safelora": values})
    assert str(error.value) == (
        "safelora settings: store_bytes is 'x': Expected `int | null`, got `str`; "
        "allow_hub is 1: Expected `bool`, got `int`; see docs/configuration.md"
    )


@pytest.mark.parametrize(
    "config",
    [
        None, "safelora", 5, {}, {"other": {"projectors": "p"}}, {"safelora": None},
        {"safelora": "projectors"}, {"safelora": ["projectors"]}, {"safelora": {}},
        {"safelora": {"projectors": ""}},
    ],
    ids=str,
)  # fmt: skip
def test_without_a_projector_cache_it_says_what_to_do(config: Any) -> None:
    with pytest.raises(GuardError) as error:
        ServerSettings.from_additional_config(config)
    assert str(error.value) == (
        "safelora is loaded but has no projector cache, so no adapter may be served. Start with "
        "'safelora-vllm serve MODEL --projectors DIR', or give vLLM --additional-config "
        """'{"safelora": {"projectors": "DIR"}}'; to run without the guard, leave safelora out of """
        "VLLM_PLUGINS or uninstall it"
    )


def test_a_new_admin_key_is_long_and_shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output may be a pipe, which gets what is printed when its buffer is full."""
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, "utf-8"))
    keys = [new_admin_key() for _ in range(3)]
    assert shown.getvalue().decode() == "".join(
        f"\nsafelora: admin key for this run (set SAFELORA_ADMIN_API_KEY to choose it): {key}\n\n"
        for key in keys
    )
    assert len(set(keys)) == 3 and all(re.fullmatch(r"[\w-]{32}", key) for key in keys), "24 random bytes"


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"method": "safe-lora", "select": "all", "number": 3}, "`number` has no effect with `select` 'all'"),
        ({"energy": 0.0}, "with `energy` 0 nothing is projected"),
    ],
    ids=["no effect", "no projection"],
)
def test_a_policy_that_does_less_than_it_says_is_refused(policy: dict[str, Any], told: str) -> None:
    """``serve`` refuses such options. A section that somebody wrote reaches the workers without them."""
    with pytest.raises(PolicyError, match=told):
        ServerSettings.from_additional_config({"safelora": {"projectors": "p", "policy": policy}})


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({}, False),
        ({"exam": "report"}, False),
        ({"second_opinion": 16}, True),
        ({"policy": {"opinion": True}}, True),
        ({"exam": "enforce"}, True),
        ({"policy": {"mode": "report-only"}}, True),
    ],
    ids=str,
)
def test_adapters_are_served_as_uploaded_only_where_something_else_looks_at_harm(
    settings: dict[str, Any], starts: bool
) -> None:
    policy = {"select": "none", **settings.pop("policy", {})}
    expected = (
        nullcontext()
        if starts
        else pytest.raises(
            GuardError,
            match=r"^--select none .* add --second-opinion 16 or --exam enforce.* add --mode report-only",
        )
    )
    with expected:
        ServerSettings.from_additional_config({"safelora": {"projectors": "p", "policy": policy, **settings}})


def test_a_path_may_be_one() -> None:
    found = ServerSettings.from_additional_config({"safelora": {"projectors": Path("p"), "store": Path("s")}})
    assert (found.projectors, found.store) == ("p", "s")


def test_a_section_comes_back_from_what_it_says() -> None:
    settings = ServerSettings("p", policy={"energy": 0.3}, adapter_roots=["a"], store_bytes=5)
    assert ServerSettings.from_additional_config(settings.to_section()) == settings


def settings(*options: str) -> ServerSettings:
    """Those of ``serve``."""
    return _settings(_parser().parse_args(["serve", "model", *options]))


def test_every_setting_has_an_option_or_stands_in_the_section_only() -> None:
    assert set(OPTIONS) | SECTION_ONLY == set(FIELDS) and not set(OPTIONS) & SECTION_ONLY
    given = settings(*(word for options, _ in OPTIONS.values() for word in options))
    assert {name: getattr(given, name) for name in OPTIONS} == {
        name: value for name, (_, value) in OPTIONS.items()
    }


@pytest.mark.parametrize("options", [["--exam-threshold", "0.02"], ["--exam-threshold=0.3", "--exam", "off"]])
def test_a_threshold_without_an_exam_is_refused_at_its_default_too(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "model", "--projectors", "p", *options]) == 2
    assert "--exam-threshold has no effect without --exam" in capsys.readouterr().err


def test_what_is_not_given_has_its_default() -> None:
    assert settings("--projectors", "/p", "--keys", "", "--adapter-store", "") == ServerSettings("/p")
    assert ServerSettings("/p").store == str(default_root())
    assert settings("--projectors", "p").projectors == str(Path("p").resolve())


def test_the_help_has_the_defaults() -> None:
    (commands,) = (action for action in _parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    text = " ".join(commands.choices["serve"].format_help().split())
    assert "largest file of an adapter; default: 2GiB" in text and "per API server; default: 8" in text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0TiB"), (1, "1B"), (1500, "1500B"), (2 * 2**30, "2GiB"), (3000, "3KB")],
)
def test_a_size_is_written_as_it_is_read(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text and size(text) == nbytes


@pytest.mark.parametrize("count", [0, -1])
def test_a_server_that_takes_no_upload_is_refused(count: int) -> None:
    with pytest.raises(GuardError, match=f"concurrent_uploads is {count}: expected 1 or more"):
        ServerSettings("p", concurrent_uploads=count)
