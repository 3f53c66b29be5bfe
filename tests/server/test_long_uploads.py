"""What may happen to a name, and to a key, while an upload is judged: an exam may take an hour."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.integration.server.change_limit import A_MINUTE
from safelora_vllm.integration.server.refusal_limit import LINES
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, TENANT_KEYS, load, upload
from tests.server.fake_server import FakeServer
from tests.tiny import Draft, lora, lora_config


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


def test_a_tenant_learns_nothing_of_others_names_by_removing_them(fake: FakeServer) -> None:
    """Nor is anything fetched for that."""
    (fake.store / "names").mkdir(exist_ok=True)
    (fake.store / "names" / "globex%2Fx.json").write_text("damaged")
    acme = fake.client(TENANT_KEYS["acme"])
    answers = [acme.delete(f"/v1/adapters/globex/{name}") for name in ("x", "none", "y" * 128)]
    assert [answer.status_code for answer in answers] == [404] * 3


def test_a_name_s_first_upload_is_removed_after_it(
    fake: FakeServer, judging: Judging, drafts: dict[str, Path]
) -> None:
    """As in vLLM: a controller that takes 404 for gone would leave the adapter behind."""
    adding = judging.begin(fake, "acme/new", drafts["other"])
    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(fake.client(ADMIN_KEY).delete, "/v1/adapters/acme/new")
        time.sleep(0.3)
        assert not removing.done()
        judging.ends.set()
        assert adding.result().status_code == 201 and removing.result().status_code == 200
    assert fake.client(ADMIN_KEY).get("/v1/adapters/acme/new").status_code == 404


def test_an_old_version_may_go_meanwhile(fake: FakeServer, judging: Judging, drafts: dict[str, Path]) -> None:
    """To make room for the new one, such as in a quota."""
    judging.ends.set()
    admin = fake.client(ADMIN_KEY)
    assert upload(admin, "acme/x", drafts["other"], replace=True).status_code == 201
    judging.ends.clear()
    judging.began.clear()
    replacing = judging.begin(fake, "acme/x", drafts["qv"], replace=True)
    assert admin.delete("/v1/adapters/acme/x/versions/1").status_code == 200
    judging.ends.set()
    assert replacing.result().status_code == 201, replacing.result().text
    numbers = [each["version"] for each in admin.get("/v1/adapters/acme/x/versions").json()["versions"]]
    assert sorted(numbers) == [2, 3]


def test_a_load_of_what_was_removed_meanwhile_is_no_success(
    fake: FakeServer, judging: Judging, drafts: dict[str, Path]
) -> None:
    """Whoever takes "already loaded" for success would have no adapter."""
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, fake.client(ADMIN_KEY), "acme/x", drafts["qv"])
        assert judging.began.wait(60)
        assert fake.client(ADMIN_KEY).delete("/v1/adapters/acme/x").status_code == 200
        judging.ends.set()
        assert loading.result().status_code == 409, loading.result().text


def test_a_tenant_over_its_share_causes_no_work(
    fake: FakeServer, judging: Judging, drafts: dict[str, Path]
) -> None:
    commits = fake.app.state.safelora_manager._commits
    for _ in range(A_MINUTE):
        commits._limit.take("acme")
    answer = upload(fake.client(TENANT_KEYS["acme"]), "acme/y", drafts["other"])
    assert answer.status_code == 429 and not judging.began.is_set()


def test_repeated_loads_that_are_refused_do_not_fill_the_log(fake: FakeServer, tmp_path: Path) -> None:
    admin, bad = fake.client(ADMIN_KEY), tmp_path / "bad"
    Draft(lora_config(use_dora=True), lora(seed=3)).write(bad)
    for _ in range(LINES + 5):
        assert load(admin, "shared", bad).status_code == 422
    told = AuditLog(fake.store / "audit").read()
    assert sum(line["adapter"] == "shared" for line in told) == LINES
