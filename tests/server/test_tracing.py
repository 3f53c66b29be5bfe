"""Spans of a change, as a collector gets them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import TENANT_KEYS, upload
from tests.server.fake_server import FakeServer

trace = pytest.importorskip("opentelemetry.trace", reason="no opentelemetry")
proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


class Collector:
    """An OTLP endpoint in this process."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collected = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = proto.ExportTraceServiceRequest.FromString(body)
                collected.extend(
                    span for r in request.resource_spans for scope in r.scope_spans for span in scope.spans
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """With a provider as vLLM makes it, for this test only."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    made = Collector()
    provider = TracerProvider()
    url = f"http://127.0.0.1:{made.http.server_port}/v1/traces"
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(url)))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield made
    provider.shutdown()
    made.http.shutdown()
    made.http.server_close()


def test_an_upload_is_a_trace(fake: FakeServer, drafts: dict[str, Path], collector: Collector) -> None:
    acme = fake.client(TENANT_KEYS["acme"])
    acme.headers["X-Request-Id"] = "r-9"
    assert upload(acme, "acme/x", drafts["qv"]).status_code == 201  # type: ignore[arg-type]
    spans = {span.name: span for span in collector.spans}
    whole = spans["safelora.upload"]
    for name in ("safelora.gate", "safelora.load", "safelora.swap"):
        assert spans[name].parent_span_id == whole.span_id and spans[name].trace_id == whole.trace_id
        given = {a.key: a.value.string_value for a in spans[name].attributes}
        assert given["safelora.adapter"] == "acme/x" and given["safelora.request_id"] == "r-9"
        assert given["safelora.tenant"] == "acme"
    for stage in ("read", "vet", "project", "publish"):
        assert spans[f"safelora.gate.{stage}"].parent_span_id == spans["safelora.gate"].span_id
    assert upload(acme, "acme/x", drafts["other"]).status_code == 409  # type: ignore[arg-type]
    failed = [span for span in collector.spans if span.name == "safelora.upload"][-1]
    assert failed.status.code == 2 and "already loaded" in failed.status.message


def test_without_a_provider_nothing_is_collected(fake: FakeServer, drafts: dict[str, Path]) -> None:
    acme = fake.client(TENANT_KEYS["acme"])
    assert upload(acme, "acme/y", drafts["qv"]).status_code == 201  # type: ignore[arg-type]
    assert not trace.get_current_span().is_recording()
