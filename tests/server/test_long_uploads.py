"""What may happen to a name, and to a key, while an upload is judged: an exam may take an hour."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import ADMIN_KEY, TENANT_KEYS, upload
from tests.server.fake_server import FakeServer


class Judging:
    """An upload that is under way: what it ends with, and the moment when it may."""

    def __init__(self, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        copies = fake.app.state.safelora.copies
        self.began, self.ends = threading.Event(), threading.Event()
        real = copies.admit

        async def slow(*arguments: Any) -> Any:
            self.began.set()
            await asyncio.to_thread(self.ends.wait, 60)
            return await real(*arguments)

        monkeypatch.setattr(copies, "admit", slow)
        self._pool = ThreadPoolExecutor(2)

    def begin(self, fake: FakeServer, name: str, folder: Path, **how: Any) -> Future[Any]:
        answer = self._pool.submit(upload, fake.client(TENANT_KEYS["acme"]), name, folder, **how)
        assert self.began.wait(60)
        return answer


@pytest.fixture
def judging(fake: FakeServer, monkeypatch: pytest.MonkeyPatch, drafts: dict[str, Path]) -> Iterator[Judging]:
    assert upload(fake.client(ADMIN_KEY), "acme/x", drafts["qv"]).status_code == 201
    made = Judging(fake, monkeypatch)
    yield made
    made.ends.set()


def test_a_name_is_removed_at_once(fake: FakeServer, judging: Judging, drafts: dict[str, Path]) -> None:
    admin = fake.client(ADMIN_KEY)
    replacing = judging.begin(fake, "acme/x", drafts["other"], replace=True)
    assert admin.delete("/v1/adapters/acme/x").status_code == 200
    assert "acme/x" not in fake.app.state.safelora.registry and not replacing.done()
    judging.ends.set()
    assert replacing.result().status_code == 409, replacing.result().text
    assert admin.get("/v1/adapters/acme/x").status_code == 404


def test_a_key_that_is_taken_out_changes_nothing_any_more(
    fake: FakeServer, judging: Judging, drafts: dict[str, Path]
) -> None:
    before = fake.client(ADMIN_KEY).get("/v1/adapters/acme/x").json()["digest"]
    replacing = judging.begin(fake, "acme/x", drafts["other"], replace=True)
    keys = Path(fake.app.state.safelora_door.keys._file)
    keys.write_text(keys.read_text().replace(TENANT_KEYS["acme"], "another secret that is long enough"))
    judging.ends.set()
    answer = replacing.result()
    assert answer.status_code == 401 and "the key acme/ci was taken out meanwhile" in answer.text
    assert fake.client(ADMIN_KEY).get("/v1/adapters/acme/x").json()["digest"] == before


def test_a_quota_is_that_of_the_end(fake: FakeServer, judging: Judging, drafts: dict[str, Path]) -> None:
    adding = judging.begin(fake, "acme/y", drafts["other"])
    keys = Path(fake.app.state.safelora_door.keys._file)
    keys.write_text(keys.read_text().replace("max_adapters = 3", "max_adapters = 1"))
    judging.ends.set()
    assert adding.result().status_code == 403 and "max_adapters is 1" in adding.result().text
