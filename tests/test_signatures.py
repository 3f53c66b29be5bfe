"""Signatures of uploads: what is accepted, whose it is, and every way to be refused."""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="the extra `signing`")
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from safelora_vllm.adapters import beside
from safelora_vllm.errors import AdapterRefused, KeysError, UsageError
from safelora_vllm.gate.admit import Admission, GateSettings, admit
from safelora_vllm.signatures.keys import key_id, private_key, public_key
from safelora_vllm.signatures.model_signing import signed_files
from safelora_vllm.signatures.rule import SigningRule
from safelora_vllm.store import PublishedStore
from safelora_vllm.tenants.keys_file import read
from safelora_vllm.tenants.signing_keys import signing_rule
from tests.packing import PACKERS
from tests.signing import (
    bundle,
    files_of,
    identity,
    new_key,
    private_pem,
    public_pem,
    rule,
    sign_folder,
    signed,
    statement,
)
from tests.tiny import Draft

REAL = Path(__file__).parent / "signed"
PEM = (REAL / "key.pub").read_text()
REAL_RULE = SigningRule({identity(PEM): PEM}, True)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
KEY, OTHER = new_key(), new_key()
KEYS = rule(KEY).keys
Answer = Callable[..., Admission]


@pytest.fixture
def judge(gate: GateSettings, store: PublishedStore) -> Answer:
    """The gate's answer to a folder or archive under a rule."""

    def judge(path: Path, signing: SigningRule | None) -> Admission:
        return admit(path, "acme/x", gate, store, signing=signing)

    return judge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter, signed with `KEY`."""
    return sign_folder(Draft().write(tmp_path / "adapter"), KEY)


def why(admission: Admission) -> str:
    """The sentences of a refusal for its signature, and for nothing else."""
    report = admission.report
    assert not report.accepted and admission.key is None and not report.signed_by
    assert {reason.code for reason in report.reasons} == {"signature"}
    assert all(not reason.message.endswith("…") for reason in report.reasons), "it fits"
    return " | ".join(reason.message for reason in report.reasons)


def refused(text: bytes, keys: dict[str, str] = KEYS) -> str:
    with pytest.raises(AdapterRefused) as found:
        signed_files(text, keys)
    (reason,) = found.value.reasons
    assert reason.code == "signature" and not reason.message.endswith("…")
    return reason.message


def test_what_model_signing_made_is_accepted(judge: Answer, tmp_path: Path) -> None:
    """As a folder, and as each kind of archive."""
    adapter = REAL / "adapter"
    key, files = signed_files((adapter / "model.sig").read_bytes(), REAL_RULE.keys)
    assert key == identity(PEM) and sorted(files) == sorted(files_of(adapter))
    admission = judge(adapter, REAL_RULE)
    assert admission.report.accepted and admission.report.signed_by == identity(PEM)
    assert admission.report.to_dict()["signed"] is True
    entries = {**files_of(adapter), "model.sig": (adapter / "model.sig").read_bytes()}
    for kind, pack in PACKERS.items():
        for prefix in ("", "x/"):
            packed = tmp_path / f"{kind}{len(prefix)}"
            packed.write_bytes(pack(*((f"{prefix}{name}", data) for name, data in entries.items())))
            assert judge(packed, REAL_RULE).report.signed_by == identity(PEM), kind


def test_the_tests_sign_as_model_signing_does() -> None:
    real = json.loads((REAL / "adapter" / "model.sig").read_text())
    payload = json.loads(base64.b64decode(real["dsseEnvelope"]["payload"]))
    made = statement(files_of(REAL / "adapter"))
    for text in (made, payload):  # a set, whose order differs from run to run
        text["predicate"]["serialization"]["ignore_paths"].sort()
    assert made == payload
    ours = bundle(b"", KEY)
    assert shape(ours) == shape(real)


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    return [shape(part) for part in value] if isinstance(value, list) else type(value)


@pytest.mark.skipif("MODEL_SIGNING" not in os.environ, reason="MODEL_SIGNING names no model_signing command")
def test_the_real_package_signs_now(judge: Answer, tmp_path: Path) -> None:
    folder, key = Draft().write(tmp_path / "adapter"), tmp_path / "key.pem"
    key.write_bytes(private_pem(KEY))
    command = [os.environ["MODEL_SIGNING"], "sign", "key", str(folder), "--private_key", str(key)]
    subprocess.run([*command, "--signature", str(folder / "model.sig")], check=True, capture_output=True)
    assert judge(folder, rule(KEY)).report.signed_by == identity(public_pem(KEY))
    sign_folder(folder, KEY)
    (tmp_path / "key.pub").write_text(public_pem(KEY))
    command = [
        os.environ["MODEL_SIGNING"],
        "verify",
        "key",
        str(folder),
        "--public_key",
        str(tmp_path / "key.pub"),
    ]
    subprocess.run([*command, "--signature", str(folder / "model.sig")], check=True, capture_output=True)


def test_who_has_to_sign(judge: Answer, folder: Path, tmp_path: Path) -> None:
    plain = Draft().write(tmp_path / "plain")
    named = identity(public_pem(KEY))
    assert judge(folder, rule(KEY, OTHER)).report.signed_by == named, "one of the keys is enough"
    assert judge(folder, rule(KEY, required=False)).report.signed_by == named
    assert judge(plain, rule(KEY, required=False)).report.to_dict()["signed"] is False
    message = why(judge(plain, rule(KEY)))
    assert "has no model.sig" in message and named in message and "require_signature" in message
    assert "one of 4 more" in why(judge(plain, rule(*(new_key() for _ in range(5)))))
    (folder / "model.sig").write_bytes(b"not a signature")
    assert "not plain JSON" in why(judge(folder, rule(KEY, required=False))), "a wrong one is refused anyway"
    assert judge(folder, None).report.to_dict()["signed"] is False, "without keys it is ignored"


def test_the_stored_report_names_no_signer(judge: Answer, folder: Path, store: PublishedStore) -> None:
    """Another tenant may upload the same content without a signature."""
    first = judge(folder, rule(KEY))
    assert first.key and first.report.signed_by
    stored = store.report(first.key)
    assert stored is not None and stored.signed_by == ""
    second, third = judge(folder, None), judge(folder, rule(KEY))
    assert second.cached and third.cached
    assert second.report.signed_by == "" and third.report.signed_by == first.report.signed_by


def test_other_bytes_than_were_signed(judge: Answer, folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    message = why(judge(folder, rule(KEY)))
    assert message.startswith("adapter_config.json: other bytes were signed than were uploaded")


def test_a_file_more(judge: Answer, folder: Path) -> None:
    (folder / "deeper").mkdir()
    (folder / "deeper" / "tokenizer.json").write_text("{}")
    message = why(judge(folder, rule(KEY)))
    assert message.startswith("deeper/tokenizer.json: uploaded, but not in model.sig")


def test_a_file_less(judge: Answer, folder: Path) -> None:
    (folder / "README.md").write_text("x")
    sign_folder(folder, KEY)
    (folder / "README.md").unlink()
    assert why(judge(folder, rule(KEY))).startswith("README.md: in model.sig, but not uploaded")


def test_the_signature_of_another_adapter(judge: Answer, folder: Path, tmp_path: Path) -> None:
    other = Draft()
    other.config["lora_alpha"] = 4
    sign_folder(other.write(tmp_path / "other"), KEY)
    shutil.copy(tmp_path / "other" / "model.sig", folder / "model.sig")
    assert "adapter_config.json: other bytes" in why(judge(folder, rule(KEY)))


def test_the_signature_of_another_tenant(judge: Answer, folder: Path) -> None:
    message = why(judge(folder, rule(OTHER)))
    for key in (KEY, OTHER):
        assert identity(public_pem(key)) in message, "found and expected"
    assert "signing_keys" in message


def test_a_link_is_not_followed(judge: Answer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    codes = {reason.code for reason in judge(folder, rule(KEY)).report.reasons}
    assert codes == {"not_regular_file"}
    (folder / "link").unlink()
    (folder / "link").symlink_to(tmp_path)
    assert {reason.code for reason in judge(folder, rule(KEY)).report.reasons} == {"not_regular_file"}
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    assert {reason.code for reason in judge(folder, rule(KEY)).report.reasons} == {"not_regular_file"}


def test_what_lies_outside_of_the_folder_of_an_archive(judge: Answer, folder: Path, tmp_path: Path) -> None:
    entries = {f"x/{name}": data for name, data in files_of(folder).items()}
    entries["x/model.sig"] = (folder / "model.sig").read_bytes()
    packed = tmp_path / "packed"
    for outside in ("model.sig", "README.md", "y/README.md", "MODEL.SIG"):
        packed.write_bytes(PACKERS["zip"](*entries.items(), (outside, b"x")))
        assert f"../{outside}: uploaded, but not in model.sig" in why(judge(packed, rule(KEY)))
    del entries["x/model.sig"]
    packed.write_bytes(PACKERS["zip"](*entries.items(), ("model.sig", (folder / "model.sig").read_bytes())))
    assert "has no model.sig" in why(judge(packed, rule(KEY)))


def test_names_that_an_archive_has_twice(judge: Answer, folder: Path, tmp_path: Path) -> None:
    entries = [*files_of(folder).items(), ("model.sig", (folder / "model.sig").read_bytes())]
    packed = tmp_path / "packed"
    for kind in ("tar", "zip"):
        packed.write_bytes(PACKERS[kind](*entries, ("model.sig", signed(FILES, OTHER))))
        assert "'model.sig' is there twice" in why(judge(packed, rule(KEY)))
        packed.write_bytes(PACKERS[kind](*entries, ("a", b"1"), ("a", b"2")))
        assert "'a' is there twice" in why(judge(packed, rule(KEY)))
        packed.write_bytes(PACKERS[kind](*entries[:-1], ("a", b"1"), ("a", b"2")))
        assert judge(packed, rule(KEY, required=False)).report.accepted, "without a signature nobody compares"


def test_reading_is_bounded(
    judge: Answer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = list(files_of(folder).items())
    packed = tmp_path / "packed"
    packed.write_bytes(PACKERS["zip"](*entries, ("model.sig", bytes(9 * 1024 * 1024))))
    assert "model.sig is over the 1,048,576 bytes" in why(judge(packed, rule(KEY)))
    (folder / "model.sig").write_bytes(bytes(1024 * 1024 + 1))
    assert "model.sig is over the 1,048,576 bytes" in why(judge(folder, rule(KEY)))
    sign_folder(folder, KEY)
    monkeypatch.setattr(beside, "BESIDE_BYTES", 4000)
    (folder / "big").write_bytes(bytes(5000))
    for required in (True, False):
        assert "are over 4,000 bytes" in why(judge(folder, rule(KEY, required=required)))
    (folder / "big").unlink()
    monkeypatch.setattr(beside, "MAX_FILES", 3)
    for number in range(4):
        (folder / str(number)).touch()
    assert "more than 3 files" in why(judge(folder, rule(KEY)))


def changed(where: str, value: object) -> bytes:
    """A valid bundle with one field replaced; ``...`` takes it out."""
    whole: dict[str, Any] = bundle(json.dumps(statement(FILES)).encode(), KEY)
    place: Any = whole
    *parents, last = where.split(".")
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    if value is ...:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return json.dumps(whole).encode()


def stated(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A bundle of a statement that was changed before it was signed."""
    text = copy.deepcopy(statement(FILES))
    change(text)
    return json.dumps(bundle(json.dumps(text).encode(), KEY)).encode()


VALID = bundle(json.dumps(statement(FILES)).encode(), KEY)
SIG = VALID["dsseEnvelope"]["signatures"][0]
OTHERS = base64.b64encode(json.dumps(statement({**FILES, "x": b""})).encode()).decode()


def test_a_valid_bundle_is_valid() -> None:
    """So that each of the cases below differs in one thing."""
    for text in (json.dumps(VALID).encode(), stated(lambda _: None), signed(FILES, KEY)):
        assert signed_files(text, KEYS)[0] == identity(public_pem(KEY))
    older = changed("verificationMaterial.publicKey", {})
    assert signed_files(older, {**rule(OTHER).keys, **KEYS})[0] == identity(public_pem(KEY)), "without a hint"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "not plain JSON"),
        (b"\x80\x04K\x01.", "not plain JSON"),
        (b"[" * 100_000, "not plain JSON"),
        (b'{"mediaType": 1, "mediaType": 2}', "a key is there twice"),
        (b"[]", "it is of type list"),
        (b"null", "it is of type NoneType"),
        (b"{}", "it is of type None"),
        (changed("mediaType", "application/vnd.dev.sigstore.bundle+json;version=0.1"), "expected appl"),
        (changed("verificationMaterial", ...), "verificationMaterial is of type NoneType"),
        (changed("verificationMaterial", {"certificate": {}}), "with a certificate or without"),
        (changed("verificationMaterial", {"x509CertificateChain": {}}), "with a certificate"),
        (changed("verificationMaterial.publicKey.hint", "0" * 64), "which is not the tenant's"),
        (changed("verificationMaterial.publicKey.hint", {"a": 1}), "which is not the tenant's"),
        (changed("dsseEnvelope", ...), "dsseEnvelope is of type NoneType"),
        (changed("dsseEnvelope.payloadType", "text/plain"), "payload is of type 'text/plain'"),
        (changed("dsseEnvelope.payloadType", ...), "payload is of type None"),
        (changed("dsseEnvelope.payload", "%"), "payload is not base64"),
        (changed("dsseEnvelope.payload", 1), "payload is not base64"),
        (changed("dsseEnvelope.payload", "ü"), "payload is not base64"),
        (changed("dsseEnvelope.payload", OTHERS), "does not fit the key"),
        (changed("dsseEnvelope.signatures", []), "it has 0 signatures"),
        (changed("dsseEnvelope.signatures", [SIG, SIG]), "it has 2 signatures"),
        (changed("dsseEnvelope.signatures", SIG), "no list of signatures"),
        (changed("dsseEnvelope.signatures.0", "x"), "signatures is of type str"),
        (changed("dsseEnvelope.signatures.0.sig", ""), "does not fit the key"),
        (changed("dsseEnvelope.signatures.0.sig", "AAAA"), "does not fit the key"),
        (changed("dsseEnvelope.signatures.0.sig", base64.b64encode(bytes(64)).decode()), "does not fit"),
        (changed("dsseEnvelope.signatures.0.sig", "MAYCAQACAQA="), "does not fit"),
    ],
)  # fmt: skip
def test_bundles_that_are_none(text: bytes, found: str) -> None:
    assert found in refused(text)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "its statement is of type"),
        (lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"), "its statement is of type"),
        (lambda s: s.pop("predicate"), "predicate is of type NoneType"),
        (lambda s: s["predicate"]["serialization"].update(method="shards"), "('shards', 'sha256')"),
        (lambda s: s["predicate"]["serialization"].update(hash_type="blake3"), "('files', 'blake3')"),
        (lambda s: s["predicate"].update(resources={}), "no list of resources"),
        (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "twice"),
        (lambda s: s["predicate"]["resources"].append(7), "resources is of type int"),
        (lambda s: s["predicate"]["resources"][0].update(algorithm="md5"), "listed with 'md5'"),
        (lambda s: s["predicate"]["resources"][0].update(digest="00"), "expected a name and the sha256"),
        (lambda s: s["predicate"]["resources"][0].update(name=None), "expected a name and the sha256"),
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "the digest of its subject"),
        (lambda s: s["subject"][0].update(digest={"sha512": "0"}), "the digest of its subject"),
        (lambda s: s["subject"].append(s["subject"][0]), "not one subject"),
        (lambda s: s.update(subject=[]), "not one subject"),
        *(
            (lambda s, name=name: s["predicate"]["resources"][0].update(name=name), "within the folder")
            for name in ("../config.json", "/etc/passwd", "a/../b", "./a", "a//b", "a\\b", "", "a\0", "a/")
        ),
    ],
)  # fmt: skip
def test_signed_statements_that_say_something_else(
    change: Callable[[dict[str, Any]], object], found: str
) -> None:
    """A tenant can sign anything."""
    assert found in refused(stated(change))


def test_the_type_of_the_payload_is_signed() -> None:
    payload = json.dumps(statement(FILES)).encode()
    assert "does not fit" in refused(json.dumps(bundle(payload, KEY, signed_as="text/plain")).encode())
    assert "payload is of type" in refused(
        json.dumps(bundle(payload, KEY, kind="text/plain", signed_as="text/plain")).encode()
    )
    assert "not plain JSON" in refused(json.dumps(bundle(b'{"a": NaN}', KEY)).encode())
    assert "its statement is of type list" in refused(json.dumps(bundle(b"[]", KEY)).encode())


def test_a_bundle_cannot_bring_its_key() -> None:
    """Neither the hint, nor a key in the bundle, nor a keyid makes a stranger's signature valid."""
    found = bundle(json.dumps(statement(FILES)).encode(), OTHER)
    found["verificationMaterial"]["publicKey"] = {
        "hint": identity(public_pem(KEY)).removeprefix("sha256:"),
        "rawBytes": public_pem(OTHER), "keyDetails": "PKIX_ECDSA_P256_SHA_256",
    }  # fmt: skip
    found["dsseEnvelope"]["signatures"][0]["keyid"] = identity(public_pem(KEY))
    assert "does not fit the key" in refused(json.dumps(found).encode())
    found["verificationMaterial"]["publicKey"]["hint"] = ""
    assert "does not fit the key" in refused(json.dumps(found).encode())


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (ec.generate_private_key(ec.SECP384R1()), "of the curve secp384r1"),
        (ec.generate_private_key(ec.SECP256K1()), "of the curve secp256k1"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (rsa.generate_private_key(65537, 2048), "RSA"),
    ],
)
def test_other_kinds_of_keys(key: Any, found: str) -> None:
    with pytest.raises(UsageError, match=found) as error:
        public_key(public_pem(key))
    assert "expected a public key of the curve P-256" in str(error.value)
    with pytest.raises(UsageError, match=found):
        private_key(private_pem(key))


def test_texts_that_are_no_keys() -> None:
    for text in (
        "",
        "a",
        "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n",
        private_pem(KEY).decode(),
    ):
        with pytest.raises(UsageError, match="none that can be read") as error:
            public_key(text)
        assert "PRIVATE" not in str(error.value), "a private key given by mistake is not shown"
    with pytest.raises(UsageError, match="none that can be read"):
        private_key(public_pem(KEY).encode())
    assert key_id(public_key(public_pem(KEY).replace("\n", "\r\n").strip())) == identity(public_pem(KEY))


def test_the_keys_file(tmp_path: Path) -> None:
    def written(text: str) -> Path:
        file = tmp_path / "keys.toml"
        file.touch(0o600)
        file.write_text(f"[tenants.acme]\n{text}")
        return file

    pem = f'"""{public_pem(KEY)}"""'
    found = read(written(f"signing_keys = [{pem}]\nrequire_signature = true")).tenants["acme"].rules
    assert found.signing == rule(KEY) and found.ruleset("x") == "x", "nothing is judged anew for it"
    assert read(written(f"signing_keys = [{pem}]")).tenants["acme"].rules.signing == rule(KEY, required=False)
    assert read(written("")).tenants["acme"].rules.signing is None
    for text, message in (
        ("require_signature = true", "require_signature is true without keys"),
        (f"signing_keys = [{pem}]\nrequire_signature = 1", "require_signature is 1"),
        (f"signing_keys = {pem}", "expected a list of at most 20 public keys"),
        ("signing_keys = [1]", "expected a list of at most 20 public keys"),
        (f"signing_keys = [{pem}, {pem}]", "number 2: the key sha256:[0-9a-f]{64} is there twice"),
        ('signing_keys = ["x"]', "signing_keys, number 1: the key is none that can be read"),
    ):
        with pytest.raises(KeysError, match=message):
            read(written(text))
    with pytest.raises(KeysError, match="at most 20"):
        signing_rule("tenants.acme", {"signing_keys": ["x"] * 21})


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cryptography.exceptions", "cryptography.hazmat.primitives.serialization"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UsageError, match=r"pip install '\.\[signing\]'"):
        public_key(PEM)
