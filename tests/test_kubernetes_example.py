"""examples/kubernetes: valid objects that fit together; options, probes and alerts that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.cli.main import _parser
from safelora_vllm.tenants.keys_file import read

yaml = pytest.importorskip("yaml", reason="no pyyaml")
FOLDER = Path(__file__).parents[1] / "examples" / "kubernetes"
RULES = FOLDER.parent / "monitoring" / "rules" / "safelora.yml"
CLAIM = "persistentVolumeClaim"
OPERATORS = {"PodMonitor", "PrometheusRule"}  # no kinds of Kubernetes itself


def documents() -> list[dict[str, Any]]:
    names = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert set(names) == {p.name for p in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    return [d for name in names for d in yaml.safe_load_all((FOLDER / name).read_text())]


def of(kind: str) -> dict[str, Any]:
    (found,) = [d for d in documents() if d["kind"] == kind]
    return found


@pytest.mark.parametrize("version", ["1.30", "1.33"])
def test_objects_are_valid(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate").validate
    for document in documents():
        if document["kind"] not in OPERATORS:
            validate(document, version, strict=True)


def test_the_deployment() -> None:
    pod = of("Deployment")["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    options = _parser().parse_known_args(server["args"])[0]
    assert options.store == "/store" and options.log_format == "json" and options.audit_stdout
    assert server["readinessProbe"]["httpGet"]["path"] == "/safelora/ready"
    assert server["startupProbe"]["httpGet"]["path"] == "/safelora/ready?strict=true"
    assert server["securityContext"]["readOnlyRootFilesystem"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in server["volumeMounts"]} == volumes
    claims = {d["metadata"]["name"] for d in documents() if d["kind"] == "PersistentVolumeClaim"}
    mounted = [v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"] if CLAIM in v]
    assert set(mounted) == claims
    labels = pod["metadata"]["labels"].items()
    for selector in (
        of("Service")["spec"]["selector"],
        of("PodMonitor")["spec"]["selector"]["matchLabels"],
        of("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    key = of("PodMonitor")["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]["key"]
    assert f"{key}=" in (FOLDER / "keys.env").read_text()


def test_the_alerts_are_those_of_the_monitoring_example() -> None:
    ours = yaml.safe_load(RULES.read_text().replace('up{job="safelora"}', 'up{job=~".*safelora"}'))
    assert of("PrometheusRule")["spec"] == ours


def test_the_keys_file_is_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    file.write_text((FOLDER / "keys.toml").read_text())
    assert "example" in read(file).tenants
