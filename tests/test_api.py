"""The Python API: what the package exports, its examples, and a live model."""

from __future__ import annotations

import doctest
import functools
import inspect
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import safelora_vllm as sl
import safelora_vllm.policy
from safelora_vllm.api import adapters, many, planning, projectors
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import ModelName
from tests.tiny import LLAMA, Draft, Pair, lora_config, module_shapes

README = Path(__file__).parent.parent / "README.md"


def readme_lines() -> str:
    """The example of the API in the README."""
    (block,) = re.findall(r"```python\n(import safelora_vllm as sl\n.*?)```", README.read_text(), re.S)
    return str(block)


@pytest.fixture
def here(pair: Pair, cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the examples are about, as the current one."""
    (tmp_path / "models").mkdir()
    for name, folder in (("base", pair.base), ("aligned", pair.aligned)):
        (tmp_path / "models" / name).symlink_to(folder)
    (tmp_path / "projectors").symlink_to(cache.folder)
    Draft().write(tmp_path / "my-adapter")
    Draft(lora_config(use_dora=True)).write(tmp_path / "bad-adapter")
    Draft().write(tmp_path / "uploads" / "first")
    Draft(lora_config(use_dora=True)).write(tmp_path / "uploads" / "second")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_is_what_is_promised_and_all_of_it_is_there() -> None:
    promised = {
        "build_projectors", "plan_projectors", "inspect_adapter", "project_adapter", "project_adapters",
        "calibrate_policy", "BulkReport", "ProjectionRecord", "Policy",
        "Plan", "ProjectorCache", "Report", "ModuleReport", "Reason", "Calibration",
        "SafeLoRAError", "AdapterRefused", "__version__",
    }  # fmt: skip
    assert set(sl.__all__) == promised and len(sl.__all__) == len(promised)
    assert promised <= set(dir(sl))
    for name in sl.__all__:
        value = getattr(sl, name)
        assert value is getattr(sl, name)
        if name != "__version__":
            assert (value.__module__ + ".").startswith("safelora_vllm.") and value.__doc__, name
    assert re.fullmatch(r"\d+\.\d+.*", sl.__version__)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = sl.other
    assert Path(sl.__file__).with_name("py.typed").exists()


def test_public_functions_document_all_their_parameters() -> None:
    for name in sl.__all__:
        value = getattr(sl, name)
        if not inspect.isfunction(value):
            continue
        text = inspect.getdoc(value) or ""
        assert all(f"\n{section}:\n" in text for section in ("Args", "Returns", "Raises", "Example")), name
        assert all(f"\n    {parameter}: " in text for parameter in inspect.signature(value).parameters), name


@pytest.mark.parametrize(
    "module", [adapters, many, planning, projectors, safelora_vllm.policy], ids=lambda m: m.__name__
)
@pytest.mark.usefixtures("here")
def test_the_examples_of_the_docstrings(module: ModuleType) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted >= 2 and outcome.failed == 0


def test_the_lines_of_the_readme(here: Path) -> None:
    (here / "projectors").unlink()
    names: dict[str, Any] = {}
    exec(readme_lines(), names)
    assert names["report"].accepted and len(load_file("projected/adapter_model.safetensors")) == 28


def test_an_archive_and_an_opened_cache_give_the_same_report(here: Path, cache: ProjectorCache) -> None:
    folder = sl.inspect_adapter(here / "my-adapter", here / "projectors")
    shutil.make_archive("my-adapter", "tar", here / "my-adapter")
    archive = sl.inspect_adapter("my-adapter.tar", cache, sl.Policy())
    assert archive == folder.named("my-adapter.tar") and folder.adapter == "my-adapter"
    assert isinstance(folder, sl.Report) and isinstance(folder.modules[0], sl.ModuleReport)


def test_a_refusal_is_a_report_or_an_error_with_the_same_reasons(here: Path) -> None:
    report = sl.inspect_adapter("bad-adapter", "projectors")
    assert not report.accepted and report.modules == [] and isinstance(report.reasons[0], sl.Reason)
    with pytest.raises(sl.AdapterRefused) as refused:
        sl.project_adapter("bad-adapter", "projectors", "out")
    assert refused.value.reasons == report.reasons and not Path("out").exists()
    assert {path.name for path in here.iterdir()} == {
        "models",
        "projectors",
        "my-adapter",
        "bad-adapter",
        "uploads",
    }
    large = sl.inspect_adapter("my-adapter", "projectors", sl.Policy(max_total_norm=1e-9))
    assert not large.accepted and len(large.modules) == 14


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/chat", ("org/chat", None)),
        ("org/chat@v1.5", ("org/chat", "v1.5")),
        ("models/base", ("models/base", None)),
        (Path("models/base"), ("models/base", None)),
        ("", ("", None)),
    ],
    ids=str,
)
def test_the_base_model_of_a_projected_adapter(
    given: Any, expected: tuple[str, str | None], here: Path
) -> None:
    sl.project_adapter("my-adapter", "projectors", "out", base_model=given)
    config = json.loads((here / "out" / "adapter_config.json").read_text())
    name, revision = expected
    name = str((here / name).resolve()) if name == "models/base" else name
    assert (config["base_model_name_or_path"], config.get("revision")) == (name, revision)


@pytest.mark.parametrize("text", [None, "{", "{}", '{"aligned": 5}'])
def test_a_cache_that_does_not_know_its_model(
    text: str | None, here: Path, cache: ProjectorCache, caplog: pytest.LogCaptureFixture
) -> None:
    old = Path(shutil.copytree(cache.folder, here / "old"))
    (old / "models.json").unlink()
    if text is not None:
        (old / "models.json").write_text(text)
    assert ProjectorCache(old).id == cache.id
    sl.project_adapter("my-adapter", old, "out")
    assert json.loads((here / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == ""
    (record,) = (record for record in caplog.records if record.name == "vllm.safelora.api")
    assert "Name it with `base_model`" in record.getMessage()


def test_a_cache_of_hub_models_knows_their_ids_and_revisions(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: getattr(pair, name[4:]))
    cache = sl.build_projectors("org/base", "org/aligned@v2", tmp_path / "cache")
    assert cache.aligned_model == ModelName("org/aligned", "v2")
    assert json.loads((cache.folder / "models.json").read_text())["base"] == {
        "name": "org/base",
        "revision": None,
    }


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: sl.inspect_adapter("my-adapter", "nowhere"), "no projector cache in nowhere"),
        (lambda: sl.inspect_adapter("nothing", "projectors"), "there is no adapter folder 'nothing'"),
        (lambda: sl.inspect_adapter(3, "projectors"), "of type int is not a valid adapter: expected"),  # type: ignore[arg-type]
        (lambda: sl.inspect_adapter("my-adapter", "projectors", device="x"), "cannot use the `device` 'x'"),
        (
            lambda: sl.project_adapter("my-adapter", "projectors", "out", sl.Policy(energy=0.99)),
            "a `max_energy` of 0.99",
        ),
        (lambda: sl.project_adapter("my-adapter", "projectors", "models"), "models exists: remove it, or"),
        (lambda: sl.calibrate_policy("projectors", sl.Policy(method="csulora")), "cannot be calibrated"),
        *(
            (functools.partial(*call, sl.Policy(number=3)), "`number` has no effect with `select` 'all'")
            for call in (
                (sl.inspect_adapter, "my-adapter", "projectors"),
                (sl.project_adapter, "my-adapter", "projectors", "out"),
                (sl.calibrate_policy, "projectors"),
            )
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_other_errors_are_of_one_root_and_say_what_to_do(call: Any, told: str) -> None:
    with pytest.raises(sl.SafeLoRAError, match=told):
        call()


@pytest.mark.parametrize("name", ["default", "second"])
def test_a_live_model_is_its_active_adapter(
    name: str, here: Path, cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import torch

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    parts = sorted({module.rpartition(".")[2] for module in module_shapes()})
    config = peft.LoraConfig(r=4, target_modules=parts, init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), config)
    model.add_adapter("second", config)
    model.set_adapter(name)
    policy = sl.Policy(max_relative_norm=100.0, max_total_norm=100.0)
    report = sl.inspect_adapter(model, cache, policy)
    assert report.accepted and report.adapter == name and len(report.modules) == 14
    model.save_pretrained(here / "saved")
    saved = here / "saved" / ("" if name == "default" else name)
    assert sl.project_adapter(model, cache, "out", policy) == report
    assert sl.inspect_adapter(saved, cache, policy) == report.named(saved.name)
    assert json.loads(Path("out/report.json").read_text())["report"]["digest"] == report.digest
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(sl.SafeLoRAError, match="expected one; call its set_adapter first"):
        sl.inspect_adapter(model, cache)


def test_a_second_opinion_is_warned_of_as_only_servers_have_one(
    cache: ProjectorCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upload = Draft().write(tmp_path / "upload")
    for policy, warned in ((sl.Policy(), 0), (sl.Policy(opinion=True), 1)):
        caplog.clear()
        sl.inspect_adapter(upload, cache, policy)
        assert sum("only a server asks the aligned model" in r.message for r in caplog.records) == warned


def test_where_nothing_is_selected_the_upload_is_what_is_served_but_caps_hold(
    cache: ProjectorCache, tmp_path: Path
) -> None:
    upload, policy = Draft().write(tmp_path / "upload"), sl.Policy(select="none")
    report = sl.project_adapter(upload, cache, tmp_path / "out", policy)
    assert {module.decision for module in report.modules} == {"kept"} and report.policy == policy
    came, served = (load_file(folder / "adapter_model.safetensors") for folder in (upload, tmp_path / "out"))
    scale = lora_config()["lora_alpha"] / lora_config()["r"]
    for name in (name for name in came if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(served[other] @ served[name], scale * came[other] @ came[name])
    tight = sl.inspect_adapter(upload, cache, sl.Policy(select="none", max_total_norm=1e-9))
    assert not tight.accepted and [reason.code for reason in tight.reasons] == ["total_norm"]
