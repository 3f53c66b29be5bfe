"""Models that `build` is given as addresses: downloaded whole, for as long as the build lasts.

Each file is of one version of its object. Whether the files belong together is not known: a server compares
the model that it serves with the one that was read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from safelora_vllm.errors import AdapterRefused, CheckpointError, UsageError
from safelora_vllm.projectors.weight_files import INDEX, weight_names
from safelora_vllm.remote.address import Source, is_remote, parse
from safelora_vllm.remote.fetch import fetch_object
from safelora_vllm.remote.reach import Reach

CONFIG = "config.json"
_SMALL_BYTES = 256 * 1024**2  # of config and index
_MOST_BYTES = 1024**4  # of a file of weights


@contextmanager
def model_on_disk(model: str, parent: Path) -> Iterator[str]:
    """The folder of a model, downloaded into ``parent`` for as long as the block lasts if it has an address.

    With the credentials of this process. There is no allowlist: whoever types an address may go there.

    Raises:
        CheckpointError: the address is not valid, or a file cannot be downloaded.
        UsageError: the disk is full or not writable.
    """
    if not is_remote(model):
        yield model
        return
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=".model-", dir=parent)
    except OSError as error:
        raise _disk(parent, error) from error
    with made as folder:
        try:
            _fetch(parse(model), Path(folder), Reach(everywhere=True))
        except AdapterRefused as error:
            raise CheckpointError(f"the model cannot be downloaded: {error.reasons[0].message}") from None
        except OSError as error:
            raise _disk(parent, error) from error
        yield folder


def _fetch(source: Source, folder: Path, reach: Reach) -> None:
    """Download config, index and weights of a model."""
    if source.is_archive:
        raise CheckpointError(f"{source} is not the address of a model: expected a folder with {CONFIG}")
    fetch_object(source.child(CONFIG), folder / CONFIG, _SMALL_BYTES, reach)
    try:
        fetch_object(source.child(INDEX), folder / INDEX, _SMALL_BYTES, reach)
    except AdapterRefused as error:
        # Without the right to list a bucket, an object that is not there is denied.
        if not {"source_not_found", "source_denied"}.intersection(error.codes):
            raise
        (folder / INDEX).unlink()
    for name in tqdm(weight_names(folder), desc=f"Downloading {source}", unit="file"):
        fetch_object(source.child(name), folder / name, _MOST_BYTES, reach)


def _disk(parent: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{parent} cannot be written ({error.strerror}): a model that is downloaded needs its size there"
    )
