"""Every hostile adapter of the corpus against a live server, one after another, beside another tenant."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from server import Server
from tqdm import tqdm

from tests.corpus import CORPUS, NAME, TAKEN, Hostile, Target
from tests.server.conftest import descendants, first_token, load, metric_samples

SECONDS = 20.0  # for any single answer; most take milliseconds


def test_the_corpus_disturbs_nobody(
    server: Server,
    admin: httpx.Client,
    user: httpx.Client,
    target: Target,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    assert load(admin, "neighbour", adapters["other"]).status_code == 200
    before, processes = first_token(user, "static"), set(descendants(server.process.pid))
    # From here on: vLLM compiles its log probabilities' kernel at the first request for one.
    admin.timeout = user.timeout = httpx.Timeout(SECONDS)
    reasons = set()
    for number, case in enumerate(tqdm(CORPUS, unit="case")):
        path = case.write(tmp_path / f"{number}", target)
        answer = send(admin, case, path)
        if answer.is_success:
            check_accepted(admin, user, case, path, target)
        else:
            reasons |= check_refused(answer, case)
        assert first_token(user, "static") == before, case.name
        assert user.get("/health").status_code == 200, case.name
    models = {card["id"] for card in user.get("/v1/models").json()["data"]}
    assert models == {"aligned", "static", "neighbour"}
    assert processes == set(descendants(server.process.pid)), "the engine or the gate was started anew"
    assert reasons <= {
        dict(labels)["reason"]
        for (name, labels), value in metric_samples(user).items()
        if name == "safelora_loads_total" and dict(labels)["result"] == "refused" and value
    }


def send(admin: httpx.Client, case: Hostile, path: Path) -> httpx.Response:
    """Load a folder by its path, upload an archive."""
    if case.archive:
        return admin.post("/v1/adapters", data={"name": case.served_as}, files={"archive": path.read_bytes()})
    body = json.dumps({"lora_name": case.served_as, "lora_path": str(path)})  # ASCII, also for surrogates
    return admin.post("/v1/load_lora_adapter", content=body, headers={"Content-Type": "application/json"})


def check_refused(answer: httpx.Response, case: Hostile) -> set[str]:
    """The refusal has one of the expected reasons; returns the first one."""
    assert len(answer.text) < 100_000 and "\n" not in answer.json()["error"]["message"], case.name
    if case.codes <= {NAME, TAKEN}:
        assert answer.status_code == 400 or (answer.status_code == 409 and TAKEN in case.codes), case.name
        return set()
    assert answer.status_code == 422, (case.name, answer.text)
    error = answer.json()["error"]
    codes = [reason["code"] for reason in error["reasons"]]
    assert codes and set(codes) <= case.codes, (case.name, answer.text)
    assert all(reason["message"].isprintable() for reason in error["reasons"]), case.name
    return {codes[0]}


def check_accepted(
    admin: httpx.Client, user: httpx.Client, case: Hostile, path: Path, target: Target
) -> None:
    """All of it is projected, as large as specified, and served from the published copy; then it goes."""
    assert case.means is not None, f"{case.name} must be refused"
    report = user.get(f"/v1/adapters/{case.served_as}").json()
    modules = {module["name"]: module for module in report["modules"]}
    meant = case.means(target)
    assert set(modules) == set(meant), case.name
    for name, delta in meant.items():
        size = float(delta.norm()) / target.modules[name].aligned_norm
        # The report measures what is served: each factor rounded to bfloat16, 2⁻⁹ of each value.
        assert modules[name]["relative_norm"] == pytest.approx(size, rel=2**-7, abs=1e-12), (case.name, name)
        assert modules[name]["decision"] == ("projected" if size else "kept"), (case.name, name)
    said = first_token(user, case.served_as)
    if case.later is not None:
        case.later(path)
        first_token(user, "static"), first_token(user, "neighbour")  # the pool holds two
        assert first_token(user, case.served_as) == said, case.name
    assert admin.delete(f"/v1/adapters/{case.served_as}").status_code == 200
