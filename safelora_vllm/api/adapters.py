"""One adapter through the gate: inspected, or projected into a new folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_vllm.adapters.read import read_adapter
from safelora_vllm.api.opened import gate_settings, with_base_model
from safelora_vllm.errors import AdapterRefused, UsageError
from safelora_vllm.files import check_new
from safelora_vllm.gate.admit import GateSettings, admit, evaluate
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import Report
from safelora_vllm.store import PublishedStore

if TYPE_CHECKING:
    from peft import PeftModel


def inspect_adapter(
    adapter: str | os.PathLike[str] | PeftModel,
    projectors: str | os.PathLike[str] | ProjectorCache,
    policy: Policy | None = None,
    *,
    device: str = "cpu",
) -> Report:
    """What the gate says about an adapter. Nothing is written.

    Args:
        adapter: a folder that PEFT saved, a .tar, .tar.gz or .zip of one, or a live ``peft.PeftModel``,
            whose active adapter is judged.
        projectors: a projector cache, or its folder.
        policy: the rules to judge it by. None: the default policy.
        device: where to project, such as ``cuda``.

    Returns:
        The report, whatever the answer: ``report.accepted``, ``report.reasons`` and ``report.modules``.

    Raises:
        AdapterNotFound: there is nothing at the path.
        UsageError: ``adapter`` or ``device`` is not usable.
        PolicyError: the policy needs more than the cache has, or has a field without effect.
        ProjectorCacheError: the cache is missing or damaged.

    Example:
        >>> import safelora_vllm as sl
        >>> report = sl.inspect_adapter("my-adapter", "projectors", policy=sl.Policy(method="safe-lora"))
        >>> report.accepted, report.count("projected"), len(report.modules)
        (True, 11, 14)
        >>> report = sl.inspect_adapter("bad-adapter", "projectors")
        >>> report.accepted, [reason.code for reason in report.reasons]
        (False, ['dora'])
    """
    settings = gate_settings(projectors, policy, device)
    with _on_disk(adapter) as (path, name):
        try:
            return evaluate(read_adapter(path, settings.limits), name, settings)[0]
        except AdapterRefused as error:
            return Report.refused(name, "", settings.cache.id, settings.policy, error)


def project_adapter(
    adapter: str | os.PathLike[str] | PeftModel,
    projectors: str | os.PathLike[str] | ProjectorCache,
    out: str | os.PathLike[str],
    policy: Policy | None = None,
    *,
    device: str = "cpu",
    base_model: str | os.PathLike[str] | None = None,
) -> Report:
    """Pass an adapter through the gate and write what may be served, as PEFT would.

    Args:
        adapter: as for `inspect_adapter`.
        projectors: a projector cache, or its folder.
        out: a new folder for ``adapter_config.json``, ``adapter_model.safetensors`` and ``report.json``.
        policy: the rules to judge it by. None: the default policy. With mode ``report-only`` the adapter is
            written unprojected.
        device: where to project, such as ``cuda``.
        base_model: the model of the new adapter, a folder or a hub id, which PEFT's
            ``AutoPeftModelForCausalLM`` loads. None: the aligned model, as `build_projectors` was given it.
            What the adapter itself names is never taken over: its author would choose what is loaded.

    Returns:
        The report of the adapter, which was accepted.

    Raises:
        AdapterRefused: the gate refuses it; nothing was written. `inspect_adapter` has the report.
        AdapterNotFound: there is nothing at the path.
        UsageError: ``out`` exists or cannot be written, or ``adapter`` or ``device`` is not usable.
        PolicyError: the policy needs more than the cache has, or has a field without effect.
        ProjectorCacheError: the cache is missing or damaged.

    Example:
        >>> import safelora_vllm as sl
        >>> report = sl.project_adapter("my-adapter", "projectors", "projected")
        >>> report.accepted, report.modules[0].name, report.modules[0].decision
        (True, 'model.layers.0.mlp.down_proj', 'projected')
        >>> try:
        ...     sl.project_adapter("bad-adapter", "projectors", "never-written")
        ... except sl.AdapterRefused as error:
        ...     print(error.codes)
        ['dora']
    """
    out = Path(out)
    check_new(out)
    settings = gate_settings(projectors, policy, device)
    return write_projected(adapter, with_base_model(settings, base_model), out)


def write_projected(adapter: str | os.PathLike[str] | PeftModel, settings: GateSettings, out: Path) -> Report:
    """`project_adapter` with a gate's settings, into a folder that is not there.

    Raises:
        AdapterRefused, AdapterNotFound, UsageError: as `project_adapter`.
    """
    with _on_disk(adapter) as (path, name), _beside(out) as scratch:
        admission = admit(path, name, settings, PublishedStore(scratch))
        if admission.folder is None:
            raise AdapterRefused(admission.report.reasons)
        shutil.move(admission.folder, out)
    return admission.report


@contextlib.contextmanager
def _on_disk(adapter: str | os.PathLike[str] | PeftModel) -> Iterator[tuple[str, str]]:
    """The path of an adapter and its name; a live one is saved to a temporary folder first."""
    if isinstance(adapter, str | os.PathLike):
        path = os.fspath(adapter)
        yield path, Path(path).resolve().name
        return
    name = _active(adapter)
    with tempfile.TemporaryDirectory(prefix="safelora-") as folder:
        adapter.save_pretrained(folder, selected_adapters=[name])
        saved = Path(folder) if name == "default" else Path(folder, name)  # as PEFT does
        yield str(saved), name


def _active(model: PeftModel) -> str:
    """The name of a live model's one active adapter.

    Raises:
        UsageError: it is not a ``peft.PeftModel``, or several of its adapters are active.
    """
    peft = sys.modules.get("peft")  # where nobody imported it, nothing is a PeftModel
    if peft is None or not isinstance(model, peft.PeftModel):
        raise UsageError(
            f"an object of type {type(model).__name__} is not a valid adapter: expected the path of a folder "
            "or an archive, or a peft.PeftModel"
        )
    if len(names := model.active_adapters) != 1:
        raise UsageError(f"the model's active adapters are {names}: expected one; call its set_adapter first")
    return str(names[0])


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[str]:
    """A temporary folder on the disk of ``out``."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=".project-")
    except OSError as error:
        raise UsageError(
            f"{out.parent} cannot be written ({error.strerror}): give another folder as `out`"
        ) from error
    with scratch as folder:
        yield folder
