"""The page in a real browser, against a fake engine: an adapter's life, keys, hostile names, size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from safelora_vllm.projectors.cache import ProjectorCache
from tests.server import browser as driver
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, TENANT_KEYS, upload, write_keys
from tests.server.fake_server import Place
from tests.tiny import Draft, lora, lora_config

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.skipif(bool(driver.missing()), reason=driver.missing() or "-")
HOSTILE = "<script>window.hurt=1</script>"
TURNED = "\u202egnp.\u05e9\u05dc\u05d5\u05dd"


@pytest.fixture(scope="module")
def started() -> Iterator[Browser]:
    with driver.browser() as browser:
        yield browser


@pytest.fixture
def url(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with the keys of `fake`, and an adapter of the command line with a hostile name."""
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    static = Draft(tensors=lora(seed=9)).write(tmp_path / "static")
    with (
        Place.start(cache, tmp_path, select="threshold", threshold=0.35) as place,
        driver.listening(
            place, {HOSTILE: static}, INFERENCE_KEY, keys=str(write_keys(place.keys)), max_adapter_bytes=10**6
        ) as (url, _),
    ):
        yield url


@pytest.fixture
def page(started: Browser, url: str) -> Iterator[Page]:
    """A page before sign-in. No script may fail, nothing be blocked, nothing be asked of another server."""
    context = started.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(10_000)
    page = context.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda m: trouble.append(m.text) if "status of" not in m.text else None)
    page.on("request", lambda r: None if r.url.startswith(url) else trouble.append(f"asked {r.url}"))
    page.goto(f"{url}/safelora/")
    yield page
    context.close()
    assert not trouble


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Adapters").wait_for()


@pytest.fixture
def admin(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as made:
        yield made


def files(folder: Path) -> list[str]:
    return [str(file) for file in sorted(folder.iterdir())]


def row(page: Page, name: str) -> Any:
    return page.locator("table.adapters tbody tr").filter(has_text=name)


def faults(page: Page) -> list[str]:
    """What axe finds that is serious or critical."""
    pytest.importorskip("axe_playwright_python", reason="no axe: pip install axe-playwright-python")
    axe = (resources.files("axe_playwright_python") / "axe.min.js").read_text()
    page.evaluate(axe)
    found = page.evaluate(
        "axe.run().then(r => r.violations.map(v => [v.id, v.impact, v.nodes.map(n => n.html)]))"
    )
    return [str(fault) for fault in found if fault[1] in ("serious", "critical")]


def test_an_adapter_s_life(page: Page, admin: httpx.Client, tmp_path: Path) -> None:
    """Upload by choice, a refusal that can be read, replace, roll back, remove a version, remove."""
    first, second = (Draft(tensors=lora(seed=seed)).write(tmp_path / f"v{seed}") for seed in (1, 2))
    dora = Draft(lora_config(use_dora=True), lora(seed=3)).write(tmp_path / "dora")
    sign_in(page, TENANT_KEYS["acme"])
    assert "Tenant acme" in page.locator("#who").inner_text()
    page.locator("#open-upload").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_label("Name", exact=True).input_value() == "acme/"
    dialog.get_by_label("Name", exact=True).fill("acme/orders")
    dialog.get_by_label("Files of the adapter").set_input_files(files(first)[:1])
    assert (
        "expected adapter_config.json and adapter_model.safetensors"
        in dialog.get_by_role("alert").inner_text()
    )
    dialog.get_by_label("Files of the adapter").set_input_files(files(dora))
    dialog.get_by_role("button", name="Upload").click()
    dialog.locator(".reasons code").wait_for()
    assert "Refused for 1 reason. Nothing was stored" in dialog.get_by_role("alert").inner_text()
    assert dialog.locator(".reasons").inner_text().startswith("dora use_dora is set")
    assert not faults(page)
    dialog.get_by_label("Files of the adapter").set_input_files(files(first))
    dialog.get_by_role("button", name="Upload").click()
    page.get_by_role("heading", name="acme/orders").wait_for()
    report = admin.get("/v1/adapters/acme/orders").json()
    projected = sum(module["decision"] == "projected" for module in report["modules"])
    assert f"accepted: {projected} of 14 modules projected" in page.locator(".verdict").inner_text()

    # The heat map has every module once, by mouse and by keyboard, with its figures.
    cells = page.get_by_role("gridcell")
    assert cells.count() == 14 and page.locator(".kept.cell[role=gridcell]").count() == 14 - projected
    page.locator(".map td").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    last = report["modules"][[m["name"] for m in report["modules"]].index("model.layers.1.mlp.down_proj")]
    told = page.locator(".readout").inner_text()
    assert told.startswith(f"model.layers.1.mlp.down_proj: {last['decision']}; rank 4")
    assert f"similarity {last['similarity']:.3f}" in told and f"{last['relative_norm']:.4f}" in told
    page.get_by_label("Retained norm").check(force=True)
    retained = f"{last['retained']:.3f}" if last["retained"] < 0.0995 else f"{last['retained']:.2f}"
    words = f"layer 1, mlp.down_proj: retained norm {retained}, {last['decision']}"
    assert cells.last.get_attribute("aria-label") == words
    assert not faults(page)

    # Replaced here, and seen here when somebody else does it.
    page.get_by_role("button", name="Replace", exact=True).click()
    dialog.get_by_label("Files of the adapter").set_input_files(files(second))
    dialog.get_by_role("button", name="Replace").click()
    page.get_by_role("button", name="Roll back to version 1").wait_for()
    page.get_by_role("button", name="Roll back to version 1").click()
    dialog.get_by_role("button", name="Cancel").click()
    assert admin.get("/v1/adapters/acme/orders").json()["version"] == 2
    page.get_by_role("button", name="Roll back to version 1").click()
    dialog.get_by_role("button", name="Roll back").click()
    page.get_by_text("serves the content of version 1 again").wait_for()
    assert admin.get("/v1/adapters/acme/orders").json()["version"] == 3
    assert upload(admin, "acme/orders", second, replace=True).status_code == 201
    page.get_by_role("button", name="Roll back to version 3").wait_for()  # it watches
    page.get_by_role("button", name="Remove version 1").click()
    dialog.get_by_role("button", name="Remove version").click()
    page.get_by_text("Version 1 of acme/orders is removed").wait_for()
    page.get_by_role("region", name="Audit trail").get_by_text("delete-version").wait_for()
    trail = page.get_by_role("region", name="Audit trail").inner_text()
    assert all(word in trail for word in ("upload", "rollback", "delete-version", "refused", "dora"))
    page.get_by_role("button", name="Remove", exact=True).click()
    dialog.get_by_role("button", name="Remove").click()
    page.get_by_text("acme/orders is removed").wait_for()
    page.get_by_role("heading", name="Adapters").wait_for()
    assert admin.get("/v1/adapters/acme/orders").status_code == 404
    row(page, "acme/orders").wait_for(state="detached")
    assert "dora" in page.get_by_role("region", name="Newest refusals").inner_text()


def test_answers_that_come_after_the_sign_out_show_nothing(
    page: Page, admin: httpx.Client, tmp_path: Path
) -> None:
    """The next reader may be another tenant's."""
    assert upload(admin, "acme/x", Draft(tensors=lora()).write(tmp_path / "x")).status_code == 201
    sign_in(page, TENANT_KEYS["acme"])
    held: list[Any] = []
    page.route("**/v1/adapters/acme/x", lambda route: held.append(route))
    page.get_by_role("link", name="acme/x").click()
    while not held:
        page.wait_for_timeout(20)
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("heading", name="Sign in").wait_for()
    for route in held:
        route.continue_()
    page.wait_for_timeout(500)
    assert page.get_by_label("Key", exact=True).is_visible()
    assert "acme" not in page.locator("main").inner_text()


def test_a_cancelled_upload_is_not_sent_on(page: Page, admin: httpx.Client, tmp_path: Path) -> None:
    sign_in(page, TENANT_KEYS["acme"])
    held: list[Any] = []
    page.route("**/v1/adapters", lambda route: held.append(route))
    page.locator("#open-upload").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name", exact=True).fill("acme/x")
    dialog.get_by_label("Files of the adapter").set_input_files(
        files(Draft(tensors=lora()).write(tmp_path / "x"))
    )
    dialog.get_by_role("button", name="Upload").click()
    while not held:
        page.wait_for_timeout(20)
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    dialog.get_by_role("button", name="Cancel").click()
    while not failed:
        page.wait_for_timeout(20)
    assert admin.get("/v1/adapters/acme/x").status_code == 404 and not dialog.count()


def test_who_sees_what(page: Page, url: str, admin: httpx.Client, tmp_path: Path) -> None:
    """Keys: wrong ones, kept or not; a tenant sees its own only; hostile names are text."""
    draft = Draft().write(tmp_path / "a")
    for name in ("acme/x", "globex/secret", "shared"):
        assert upload(admin, name, draft).status_code == 201
    page.get_by_label("Key", exact=True).fill("nobody-has-this")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("this route needs").wait_for()
    assert not faults(page)
    sign_in(page, TENANT_KEYS["acme"])
    assert "globex" not in page.content() and row(page, "acme/x").count() == row(page, "shared").count() == 1
    page.get_by_role("link", name="shared").click()
    page.locator(".map").wait_for()
    assert page.get_by_role("button", name="Remove").count() == 0, "it is not its own"
    page.evaluate("location.hash = '#/adapter/globex%2Fsecret'")
    page.get_by_text("There is no adapter globex/secret for this key").wait_for()
    page.reload()
    assert page.get_by_label("Key", exact=True).input_value() == "", "a reload forgets the key"
    page.goto(f"{url}/safelora/")
    page.get_by_text("Keep it until this tab is closed").click()
    sign_in(page, INFERENCE_KEY)
    assert page.locator("#open-upload").is_hidden() and row(page, "shared").count() == 1
    page.reload()
    page.get_by_role("heading", name="Adapters").wait_for()
    page.get_by_role("button", name="Sign out").click()
    assert page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0

    sign_in(page, ADMIN_KEY)
    assert (
        row(page, HOSTILE).locator("a").inner_text() == HOSTILE and "fixed" in row(page, HOSTILE).inner_text()
    )
    row(page, HOSTILE).locator("a").click()
    page.get_by_role("heading", name=HOSTILE).wait_for()
    assert page.evaluate("window.hurt") is None


def test_a_thousand_adapters_and_names_that_turn(page: Page, admin: httpx.Client, tmp_path: Path) -> None:
    """Names from a server that checks none of them; how long a thousand take."""
    assert upload(admin, "acme/x", Draft().write(tmp_path / "a")).status_code == 201
    body = admin.get("/v1/overview").json()
    item = next(a for a in body["adapters"] if a["name"] == "acme/x")
    many = [{**item, "name": f"tenant{i % 20}/adapter-{i:04d}", "version": i % 7 + 1} for i in range(995)]
    reasons = [{"code": "total_norm", "message": f"{HOSTILE} {TURNED}"}]
    many += [
        {
            **item,
            "name": TURNED,
            "state": "refused",
            "reasons": reasons,
            "problem": "today's rules refuse it",
        },
        {
            **item,
            "name": "<img src=x onerror=window.hurt=1>",
            "mode": "report-only",
            "override": True,
            "second_opinion": True,
        },
        {**item, "name": "other/by-opinion", "method": "none", "second_opinion": True},
        {**item, "name": "other/by-exam", "method": "none", "exam": {"passed": True, "enforced": True}},
        {**item, "name": "other/by-nothing", "method": "none", "exam": {"passed": True, "enforced": False}},
    ]
    text = json.dumps({**body, "adapters": many})
    page.route("**/v1/overview", lambda route: route.fulfill(body=text, content_type="application/json"))
    sign_in(page, ADMIN_KEY)
    assert page.locator("table.adapters tbody tr").count() == 100
    assert "1000 adapters: 999 served, 1 refused" in page.locator(".count").inner_text()
    took = page.evaluate(
        """async () => {
            const search = document.querySelector("#search"), times = {};
            const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
            const timed = async (name, act) => {
                const began = performance.now();
                act();
                await frame();
                times[name] = performance.now() - began;
            };
            const type = text => { search.value = text; search.dispatchEvent(new Event("input")); };
            await timed("filter", () => type("tenant7 adapter-09"));
            times.rows = document.querySelectorAll("table.adapters tbody tr").length;
            await timed("clear", () => type(""));
            await timed("sort", () => document.querySelector("th:nth-child(3) .sort").click());
            const next = document.querySelector(".more button:last-child");
            await timed("next", () => next.click());
            times.place = document.querySelector(".more").textContent;
            return times;
        }"""
    )
    print("milliseconds with 1,000 adapters:", took)
    assert took["rows"] == sum("tenant7/" in a["name"] and "adapter-09" in a["name"] for a in many)
    assert "101 to 200 of 1000" in took["place"]
    # Each takes some tens of milliseconds on an idle core, and the machine may be a busy one.
    assert max(took[name] for name in ("filter", "clear", "sort", "next")) < 2000, took
    page.locator("#search").fill("total_norm")
    assert page.locator("table.adapters tbody tr").count() == 1
    link = page.locator("table.adapters tbody a")
    assert link.inner_text() == TURNED.replace("\u202e", "\\u202e"), (
        "what turns the text is shown as its code"
    )
    page.locator("#search").fill("onerror")
    assert "unprojected" in page.locator("table.adapters tbody").inner_text()
    for how, tag in (("opinion", "as uploaded"), ("exam", "as uploaded"), ("nothing", "unprojected")):
        page.locator("#search").fill(f"other/by-{how}")
        row = page.locator("table.adapters tbody").inner_text()
        assert tag in row and ("unprojected" in row) == (how == "nothing") and "none of 14" in row, row
    page.locator("#search").fill("second opinion")
    assert page.locator("table.adapters tbody tr").count() == 2
    assert "second opinion" in page.locator("table.adapters tbody").inner_text()
    page.locator("#search").fill("onerror")
    link.click()
    page.evaluate("location.hash = '#/'")
    page.locator("#search").fill("no such thing")
    page.get_by_role("button", name="Clear the search").click()
    page.locator("#search").fill(TURNED)
    link.click()
    page.locator(".reasons").wait_for()
    assert HOSTILE in page.locator(".reasons").inner_text() and page.evaluate("window.hurt") is None
    assert not faults(page)


def test_dark_and_small(started: Browser, url: str, admin: httpx.Client, tmp_path: Path) -> None:
    """No sideways scrolling on a phone, and enough contrast in the dark; a drop opens the upload."""
    assert upload(admin, "acme/x", Draft().write(tmp_path / "a")).status_code == 201
    context = started.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(f"{url}/safelora/")
    sign_in(page, ADMIN_KEY)
    for place in ("#/", "#/adapter/acme%2Fx"):
        page.evaluate(f"location.hash = '{place}'")
        page.get_by_role("heading", name="acme/x" if place != "#/" else "Adapters").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert not faults(page)
    page.evaluate(
        """() => { const transfer = new DataTransfer();
        for (const name of ["adapter_config.json", "adapter_model.safetensors"])
            transfer.items.add(new File(["x"], name));
        const given = {dataTransfer: transfer, bubbles: true, cancelable: true};
        document.body.dispatchEvent(new DragEvent("drop", given)); }"""
    )
    page.get_by_text("Chosen: adapter_config.json (1 B) and adapter_model.safetensors (1 B)").wait_for()
    assert not faults(page)
    context.close()


def test_the_page_s_files(url: str) -> None:
    """Open to anybody, as they hold no data; under a strict policy; not sent twice."""
    with httpx.Client(base_url=url) as http:
        _check_files(http)


def _check_files(http: httpx.Client) -> None:
    answer = http.get("/safelora/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "<style" not in answer.text and " style=" not in answer.text and answer.text.count("<script") == 1
    assert http.get("/safelora").status_code == 307
    script = http.get("/safelora/page/main.js")
    assert script.headers["content-type"].startswith("text/javascript") and script.headers["etag"]
    again = http.get("/safelora/page/main.js", headers={"If-None-Match": script.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for wrong in ("index.html", "none.js", "..%2f..%2ffiles.py"):
        assert http.get(f"/safelora/page/{wrong}").status_code in (401, 404), wrong
    assert http.get("/v1/overview").status_code == 401


def test_a_server_without_the_page(
    cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    with Place.start(cache, tmp_path) as place, place.server(no_page=True) as server:
        for path in ("/safelora/", "/safelora/page/main.js"):
            assert server.client(ADMIN_KEY).get(path).status_code == 404
