"""Every query of examples/monitoring has data where a real engine serves; an incident: `test_monitoring`."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import httpx
from server import Server

from safelora_vllm.adapters.read import CONFIG
from tests.server.conftest import TENANT_KEYS, client, load, say, upload
from tests.server.prometheus import asked, needs_prometheus, scraping

pytestmark = needs_prometheus
# Part of a query → why it has no answer here.
EMPTY = {
    'absent(up{job="safelora"})': "a server is scraped",
    'mode="report-only"': "adapters are projected",
    'method="none"': "adapters are projected",
    "_exam": "nobody asked for an exam",
    'second_opinion="true"': "no policy asks for one",
    "safelora_store_limit_bytes": "the server has no --store-bytes",
}


def test_every_query_has_data(
    server: Server, admin: httpx.Client, adapters: dict[str, Path], tmp_path: Path
) -> None:
    seeds, dora = itertools.count(), shutil.copytree(adapters["qv"], tmp_path / "dora")
    config = json.loads((dora / CONFIG).read_text())
    (dora / CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    with client(server, TENANT_KEYS["acme"]) as acme:
        assert upload(acme, "acme/used", adapters["qv"]).status_code == 201
        load(admin, "beside", adapters["other"])

        def traffic() -> None:
            say(acme, "acme/used", f"The capital of France {next(seeds)}")
            say(admin, "beside")
            assert upload(acme, "acme/dora", dora).status_code == 422

        queries = asked("acme/used", "acme")
        empty = {query for query in queries if any(part in query for part in EMPTY)}
        with scraping(server.url.removeprefix("http://"), tmp_path / "prometheus") as prometheus:
            found = prometheus.empty(queries.keys() - empty, traffic)
            assert not found, {query: queries[query] for query in found}
            assert not [query for query in empty if prometheus.ask(query)]
            assert prometheus.ask('up{job="safelora"}')[0]["value"][1] == "1"
        acme.delete("/v1/adapters/acme/used")
