"""examples/kubernetes: valid objects that fit together; options, probes and alerts that exist."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.cli.main import _parser
from safelora_vllm.errors import KeysError
from safelora_vllm.tenants.keys import KeyRing
from safelora_vllm.tenants.keys_file import read

yaml = pytest.importorskip("yaml", reason="no pyyaml")
FOLDER = Path(__file__).parents[1] / "examples" / "kubernetes"
RULES = FOLDER.parent / "monitoring" / "rules" / "safelora.yml"
CLAIM = "persistentVolumeClaim"
OPERATORS = {"PodMonitor", "PrometheusRule"}  # no kinds of Kubernetes itself


def documents() -> list[dict[str, Any]]:
    names = kustomization()["resources"]
    assert set(names) == {p.name for p in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    return [d for name in names for d in yaml.safe_load_all((FOLDER / name).read_text())]


def kustomization() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    return found


def example_environment() -> dict[str, str]:
    lines = (FOLDER / "keys.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def of(kind: str) -> dict[str, Any]:
    (found,) = [d for d in documents() if d["kind"] == kind]
    return found


@pytest.mark.parametrize("version", ["1.30", "1.33"])
def test_objects_are_valid(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate").validate
    for document in documents():
        if document["kind"] not in OPERATORS:
            validate(document, version, strict=True)


def test_the_pod_that_fills_the_volume_of_the_models(version: str = "1.33") -> None:
    """It writes, as the servers' user and with their image, what they read."""
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate").validate
    pod = yaml.safe_load((FOLDER / "fill" / "pod.yaml").read_text())
    validate(pod, version, strict=True)
    servers = of("Deployment")["spec"]["template"]["spec"]
    assert pod["spec"]["securityContext"] == servers["securityContext"]
    (fill,), (server,) = pod["spec"]["containers"], servers["containers"]
    assert fill["image"] == server["image"]
    assert fill["securityContext"] == server["securityContext"]
    (models,) = [v[CLAIM] for v in pod["spec"]["volumes"] if CLAIM in v]
    (read,) = [v[CLAIM] for v in servers["volumes"] if v["name"] == "models"]
    assert models["claimName"] == read["claimName"] and read["readOnly"] and "readOnly" not in models
    places = [
        {m["name"]: m["mountPath"] for m in container["volumeMounts"]}["models"]
        for container in (fill, server)
    ]
    assert places[0] == places[1] and all(
        path.startswith(f"{places[0]}/") for path in _models(server["args"])
    )
    (claim,) = [
        d for d in documents() if d["kind"] == "PersistentVolumeClaim" and d["metadata"]["name"] == "models"
    ]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "others mount what one pod has written"
    page = (FOLDER.parents[1] / "docs" / "deployment.md").read_text()
    assert all(path in page for path in _models(server["args"])), "where the page has them put"


def _models(args: list[str]) -> list[str]:
    """The model and the projectors of a server's arguments."""
    return [args[1], *(a.partition("=")[2] for a in args if a.startswith("--projectors="))]


def test_the_autoscaler_goes_by_a_recording_rule_that_the_page_provides() -> None:
    (metric,) = of("HorizontalPodAutoscaler")["spec"]["metrics"]
    page = (FOLDER.parents[1] / "docs" / "deployment.md").read_text()
    _, found, block = page.partition("```yaml\nrules:\n")
    assert found, "no configuration of the adapter"
    (rule,) = yaml.safe_load("rules:\n" + block.partition("```")[0])["rules"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    recorded = [
        r["record"] for g in of("PrometheusRule")["spec"]["groups"] for r in g["rules"] if "record" in r
    ]
    assert rule["seriesQuery"].partition("{")[0] in recorded
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


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


def test_every_reference_names_a_secret_of_the_generator() -> None:
    """kustomize renames no secret in a PodMonitor: hash suffixes have to be off."""
    made = kustomization()
    assert made["generatorOptions"] == {"disableNameSuffixHash": True}
    files, environment = made["secretGenerator"]
    assert files == {"name": "safelora-keys", "files": ["keys.toml"]}
    assert environment == {"name": "safelora-environment", "envs": ["keys.env"]}
    pod = of("Deployment")["spec"]["template"]["spec"]
    (keys,) = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
    assert keys == files["name"]
    # The environment gets no tenants' keys.
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": environment["name"]}}]
    asked = of("PodMonitor")["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]
    assert asked["name"] == environment["name"]
    assert asked["key"] in example_environment()


def test_nothing_is_applied_without_keys_of_its_own(tmp_path: Path) -> None:
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("no kubectl")
    folder = shutil.copytree(
        FOLDER, tmp_path / "mine", ignore=shutil.ignore_patterns("keys.env", "keys.toml")
    )
    build = [kubectl, "kustomize", str(folder)]
    for name in ("keys.env", "keys.toml"):
        failed = subprocess.run(build, capture_output=True, text=True, check=False)
        assert failed.returncode and "keys." in failed.stderr
        shutil.copy(folder / f"{name}.example", folder / name)
    built = subprocess.run(build, capture_output=True, text=True, check=True).stdout
    secrets = {d["metadata"]["name"]: d["data"] for d in yaml.safe_load_all(built) if d["kind"] == "Secret"}
    assert {name: set(data) for name, data in secrets.items()} == {
        "safelora-keys": {"keys.toml"}, "safelora-environment": set(example_environment()),
    }  # fmt: skip


def test_the_alerts_are_those_of_the_monitoring_example() -> None:
    ours = yaml.safe_load(RULES.read_text().replace('up{job="safelora"}', 'up{job=~".*safelora"}'))
    assert of("PrometheusRule")["spec"] == ours


def test_the_examples_own_secrets_are_refused(tmp_path: Path) -> None:
    """Whoever copies the files and edits nothing must not serve with public keys."""
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    text = (FOLDER / "keys.toml.example").read_text()
    file.write_text(text)
    with pytest.raises(KeysError, match=r"tenants\.example\.keys\.ci .*replace-this.*openssl rand"):
        read(file)
    for spelled in ("replace this ", "Replace_this_"):
        file.write_text(text.replace("replace-this-", spelled))
        with pytest.raises(KeysError, match="is an example's secret"):
            read(file)
    file.write_text(text.replace("replace-this", "3fd1"))
    assert "example" in read(file).tenants
    for name, secret in example_environment().items():
        given = {
            "SAFELORA_ADMIN_API_KEY": None,
            "SAFELORA_METRICS_KEY": None,
            "VLLM_API_KEY": None,
            name: secret,
        }
        inference = [key for key in (given["VLLM_API_KEY"],) if key]
        with pytest.raises(KeysError, match=r"begins with replace-this"):
            KeyRing.open(None, given["SAFELORA_ADMIN_API_KEY"], inference, given["SAFELORA_METRICS_KEY"])
