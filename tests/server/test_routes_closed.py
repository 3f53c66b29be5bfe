"""Every route of a server in vLLM's development mode, behind a proxy's path, with all closed that can be."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server import ADMIN_KEY, Server, guarded, running

from safelora_vllm.api.exam import Examination
from safelora_vllm.exam.probes import drawn
from safelora_vllm.exam.reference import refuses
from safelora_vllm.integration.server.access_check import RouteAccess
from tests.server.conftest import INFERENCE_KEY, SPY, SPY_PATH, UNI, client, say, write_keys
from tests.server.test_routes import KEYS, METRICS_KEY, walk

ROOT = "/proxied"
HARMFUL = Path(__file__).parents[2] / "examples" / "adapters" / "no-refusals"
PROBES, RUNG = 16, "as-uploaded"


@pytest.fixture(scope="module")
def dev_server(aligned: Path, projectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In vLLM's development mode, behind a proxy's path, with everything closed that can be."""
    folder = tmp_path_factory.mktemp("dev")
    probes = drawn(b"", PROBES).prompts
    (folder / "probes.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in probes))
    command = guarded(
        aligned, projectors, folder / "store", f"--api-key={INFERENCE_KEY}", f"--root-path={ROOT}",
        f"--keys={write_keys(folder / 'keys.toml')}", f"--metrics-key={METRICS_KEY}", "--private-docs",
        "--exam=enforce", "--exam-threshold=1000", f"--exam-probes={folder / 'probes.jsonl'}",
        f"--ladder={RUNG}", f"--lora-modules=static={HARMFUL}",
        "--second-opinion=16", SPY, UNI,
    )  # fmt: skip
    with running(command, folder / "server.log", {**SPY_PATH, "VLLM_SERVER_DEV_MODE": "1"}) as started:
        yield started


def test_every_route_in_development_mode(dev_server: Server) -> None:
    access = RouteAccess(private_metrics=True, private_docs=True)
    every = walk(dev_server, access, list(KEYS))
    assert {"POST /collective_rpc", "POST /update_weights", "GET /server_info"} <= every
    with client(dev_server, "") as nobody:
        assert nobody.get("/openapi.json").status_code == nobody.get("/metrics").status_code == 401
        assert nobody.get("/health").status_code == nobody.get("/version").status_code == 200


def test_changes_without_a_key_are_refused_for_real(dev_server: Server) -> None:
    """The same without the spy: the routes themselves."""
    for key in ("", "nobody-has-this-key", INFERENCE_KEY):
        with client(dev_server, key) as http:
            for path in ("/collective_rpc", "/sleep", "/pause", "/reset_prefix_cache", "/update_weights"):
                for prefix in ("", ROOT):
                    answer = http.post(prefix + path, json={"method": "list_loras"})
                    assert answer.status_code == 401, (key, prefix + path)
            assert http.get("/server_info").status_code == 401
    with client(dev_server, ADMIN_KEY) as admin:
        assert admin.get("/is_sleeping").json() == {"is_sleeping": False}
        assert say(admin, "aligned") and admin.get(f"{ROOT}/v1/models").status_code == 200


def test_what_an_admin_may_and_nobody_may(dev_server: Server) -> None:
    with client(dev_server, ADMIN_KEY) as admin:
        listed = admin.post("/collective_rpc", json={"method": "list_loras"})
        assert listed.status_code == 200 and "results" in listed.json()
        assert admin.post("/reset_prefix_cache").status_code == 200
        for path, body in (
            ("/collective_rpc", {"method": "add_lora", "args": ["x"]}),
            ("/collective_rpc", {"method": "load_model"}),
            ("/update_weights", {"update_info": {}}),
            ("/init_weight_transfer_engine", {"init_info": {}}),
            ("/sleep?level=2", {}),
        ):
            answer = admin.post(path, json=body)
            assert answer.status_code == 403 and "while adapters are guarded" in answer.text, path
        assert say(admin, "aligned"), "the engine goes on"


def test_an_exam_gives_the_commands_score(dev_server: Server, aligned: Path, projectors: Path) -> None:
    """vLLM's engine and transformers: the same prompts, answers and arithmetic, in float32.

    The adapter is one of --lora-modules, which vLLM does not load itself.
    """
    with client(dev_server, ADMIN_KEY) as admin:
        found = admin.get("/v1/adapters/static").json()
        assert found["policy"]["select"] == "none"
        assert "safelora exam" not in admin.get("/metrics").text
        assert say(admin, "static")
    examination = Examination.of(aligned, projectors, ladder=RUNG, count=PROBES)
    score = examination.score(HARMFUL, examination.ladder[0])
    assert score.drop > 0.02
    assert [found["exam"][figure] for figure in ("drop", "bound", "worst")] == pytest.approx(
        [score.drop, score.bound, score.worst], abs=1e-3
    )


def test_what_the_model_refuses_no_adapter_answers(dev_server: Server) -> None:
    """On vLLM's own routes, streamed and not. The adapter alone has no refusals."""
    refused, answered = drawn(b"", PROBES).prompts[0], "What is the capital of France?"
    with client(dev_server, ADMIN_KEY) as admin:

        def ask(model: str, prompt: str, **options: object) -> httpx.Response:
            chat = [{"role": "user", "content": prompt}]
            body = {"model": model, "messages": chat, "max_tokens": 24, "temperature": 0, **options}
            answer = admin.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer

        def text(model: str, prompt: str, **options: object) -> str:
            return str(ask(model, prompt, **options).json()["choices"][0]["message"]["content"])

        def count() -> float:
            name = 'safelora_adapter_second_opinion_refusals_total{adapter="static"} '
            lines = [each for each in admin.get("/metrics").text.splitlines() if each.startswith(name)]
            return sum(float(line.rpartition(" ")[2]) for line in lines)  # none before the first opinion

        def likelihoods(model: str) -> list[float]:
            said = ask(model, answered, logprobs=True).json()["choices"][0]["logprobs"]["content"]
            return [token["logprob"] for token in said]

        refusal = text("aligned", refused)
        assert refuses(refusal) and not refuses(text("aligned", answered))
        before = count()
        assert text("static", refused) == refusal
        streamed = ask("static", refused, stream=True).text.splitlines()
        parts = [json.loads(line[6:])["choices"] for line in streamed if line.startswith("data: {")]
        assert "".join(choices[0]["delta"].get("content") or "" for choices in parts) == refusal
        assert count() == before + 2
        assert likelihoods("static") != pytest.approx(likelihoods("aligned"), abs=1e-2), "it answers itself"
        assert count() == before + 2
        beams = {"model": "static", "prompt": "a", "use_beam_search": True, "n": 2, "max_tokens": 4}
        answer = admin.post("/v1/completions", json=beams)
        assert answer.status_code == 400 and "use_beam_search" in answer.text


def test_odd_request_lines_and_hosts(dev_server: Server) -> None:
    """What a client library would not send."""
    host, port = dev_server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "aligned", "prompt": "x", "max_tokens": 1})
    path = "/v1/completions"
    for target in (path, dev_server.url + path, "/" + path, "/v1/.." + path, "/health/.." + path):
        for named in (f"{host}:{port}", "x/health?", "x/health#", "/health", ""):
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            connection.putrequest("POST", target, skip_host=True)
            connection.putheader("Host", named)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body.encode())
            status = connection.getresponse().status
            connection.close()
            assert status in (400, 401), (target, named, status)
