"""All adapters of a folder through the gate."""

from __future__ import annotations

import os
from pathlib import Path

from safelora_vllm.api.opened import gate_settings, with_base_model
from safelora_vllm.bulk.run import BulkReport, run
from safelora_vllm.errors import UsageError
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache


def project_adapters(
    folder: str | os.PathLike[str],
    projectors: str | os.PathLike[str] | ProjectorCache,
    out: str | os.PathLike[str],
    policy: Policy | None = None,
    *,
    device: str = "cpu",
    base_model: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    projector_memory: int | None = None,
    ray: str | None = None,
) -> BulkReport:
    """Pass all adapters of a folder through the gate, and write what may be served.

    Each result is a folder ``out/NAME``, with a record in ``out/.catalogue``. A second run skips adapters
    whose content and rules are those of their records. It does the others, also those that a killed run left.

    Args:
        folder: its folders and its .tar, .tar.gz, .tgz and .zip files are the adapters.
        projectors: a projector cache, or its folder.
        out: a folder for the results, outside of ``folder``. It may have those of earlier runs. A folder
            there that has an adapter's name, and that no run made, is an error. Others are left alone.
        policy: as for `project_adapter`.
        device: as for `project_adapter`.
        base_model: as for `project_adapter`.
        jobs: processes at once. Each of them holds the projectors that the policy reads. None: one, which is
            this process; with ``ray`` as many as the cluster has processors.
        projector_memory: most bytes that each process takes for projectors and for the work of an
            adapter. The rest is read at each use.
        ray: the address of a Ray cluster, as ``ray.init`` takes it. Its machines need this package, and must
            see all folders under the same paths. None: this machine.

    Returns:
        What became of each adapter. Refused ones are in it; they raise nothing.

    Raises:
        UsageError: there are no adapters, two have one name, ``out`` cannot be used or has a folder with an
            adapter's name that no run made, or another argument is not usable.
        PolicyError: the policy needs more than the cache has, or has a field without effect.
        ProjectorCacheError: the cache is missing or damaged.

    Example:
        >>> import safelora_vllm as sl
        >>> report = sl.project_adapters("uploads", "projectors", "all-projected")
        >>> [(record.name, record.answer) for record in report.records]
        [('first', 'accepted'), ('second', 'refused')]
        >>> again = sl.project_adapters("uploads", "projectors", "all-projected")
        >>> sorted(again.unchanged)
        ['first', 'second']
    """
    for name, value in (("jobs", jobs), ("projector_memory", projector_memory)):
        if value is not None and value < 1:
            raise UsageError(f"`{name}` is {value}: expected 1 or more")
    settings = with_base_model(gate_settings(projectors, policy, device), base_model)
    return run(Path(folder), Path(out), settings, jobs, projector_memory, ray)
