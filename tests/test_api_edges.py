"""The Python API at its edges: names of adapters, where work is done, and live models without PEFT."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import safelora_vllm as sl
from safelora_vllm.api import adapters as api
from safelora_vllm.errors import PolicyError, UsageError
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from tests.tiny import Draft


def test_an_adapter_is_named_as_its_folder_however_it_is_given(
    cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Draft().write(tmp_path / "mine")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for given in (".", folder, f"{folder}/", "../mine", tmp_path / "link"):
        assert sl.inspect_adapter(given, cache).adapter == "mine"


def test_the_new_adapter_is_made_beside_its_place(
    cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same disk, so that its folder appears whole; nothing is left, also when the work fails."""
    folder, out = Draft().write(tmp_path / "mine"), tmp_path / "a" / "b" / "out"
    places: list[Path] = []

    def failing(_: str, __: str, ___: Any, store: PublishedStore) -> None:
        places.append(Path(store.root))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(api, "admit", failing)
        with pytest.raises(KeyboardInterrupt):
            sl.project_adapter(folder, cache, out)
    assert places[0].parent == out.parent and places[0].name.startswith(".project-")
    assert not list(out.parent.iterdir())
    sl.project_adapter(folder, cache, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_place_below_a_file_is_wrong_usage(cache: ProjectorCache, tmp_path: Path) -> None:
    folder = Draft().write(tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"file cannot be written .*: give another folder as `out`"):
        sl.project_adapter(folder, cache, tmp_path / "file" / "out")


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Any]:
    """A model with these active adapters, of a PEFT that only saves."""
    peft = ModuleType("peft")

    class PeftModel:
        def __init__(self, active: list[str]) -> None:
            self.active_adapters, self.saved = active, []

        def save_pretrained(self, folder: str, **options: Any) -> None:
            self.saved.append((folder, options))
            (name,) = self.active_adapters
            Draft().write(Path(folder, "written"))
            for file in Path(folder, "written").iterdir():
                place = Path(folder) if name == "default" else Path(folder, name)
                place.mkdir(exist_ok=True)
                file.rename(place / file.name)

    peft.PeftModel = PeftModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft", peft)
    return PeftModel


@pytest.mark.parametrize("name", ["default", "second"])
def test_of_a_live_model_the_active_adapter_alone_is_saved_for_a_while(
    name: str, live: Callable[[list[str]], Any], cache: ProjectorCache
) -> None:
    model = live([name])
    report = sl.inspect_adapter(model, cache)
    assert (report.adapter, report.accepted) == (name, True)
    ((folder, options),) = model.saved
    assert options == {"selected_adapters": [name]}
    assert not Path(folder).exists()


@pytest.mark.parametrize("active", [[], ["a", "b"]])
def test_a_live_model_has_one_active_adapter(
    active: list[str], live: Callable[[list[str]], Any], cache: ProjectorCache
) -> None:
    with pytest.raises(UsageError, match="expected one; call its set_adapter first"):
        sl.inspect_adapter(live(active), cache)


def test_without_peft_nothing_is_a_live_model(
    live: Callable[[list[str]], Any], cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = live(["default"])
    with pytest.raises(UsageError, match="an object of type object is not a valid adapter"):
        sl.inspect_adapter(object(), cache)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "peft")
    with pytest.raises(UsageError, match="an object of type PeftModel is not a valid adapter"):
        sl.inspect_adapter(model, cache)


def test_a_policy_is_checked_before_the_adapter_is_read_and_every_method_works_with_a_thin_cache(
    thin: ProjectorCache, tmp_path: Path
) -> None:
    adapter = Draft().write(tmp_path / "mine")
    for call in (
        sl.inspect_adapter,
        lambda *given: sl.project_adapter(*given[:2], tmp_path / "out", given[2]),
    ):
        with pytest.raises(PolicyError, match="`number` has no effect with `select` 'threshold'"):
            call(tmp_path / "none", thin, sl.Policy(method="safe-lora", number=3))
        report = call(adapter, thin, sl.Policy(method="safe-lora"))
        assert report.accepted and all(module.similarity_error > 0 for module in report.modules)


def test_a_policy_that_is_none(cache: sl.ProjectorCache) -> None:
    with pytest.raises(UsageError, match="`policy` is of type dict: expected a Policy"):
        sl.inspect_adapter("nothing", cache, {"energy": 0.1})  # type: ignore[arg-type]
