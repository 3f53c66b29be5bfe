"""What callers are told of a server that is out of order: its status, and no path of its files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from safetensors import SafetensorError, safe_open

from safelora_vllm import errors
from safelora_vllm.errors import (
    AdapterRefused,
    GateUnavailable,
    ProjectorCacheError,
    Reason,
    SafeLoRAError,
    UsageError,
)
from safelora_vllm.integration.server.access_check import MethodNotAllowed
from safelora_vllm.integration.server.callers import acting_as
from safelora_vllm.integration.server.http_errors import NotServing, documented, error_response
from safelora_vllm.integration.server.uploads import TooLarge, TooManyUploads, UploadTimeout
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.tenants.principal import UNAUTHENTICATED, Principal
from tests.tiny import Q0

TENANT, ADMIN = Principal("tenant", "acme/ci", "acme"), Principal("admin", "admin/ops")
STATUSES: dict[type[SafeLoRAError], tuple[int, str]] = {
    errors.Unauthorized: (401, "AuthenticationError"),
    errors.Forbidden: (403, "PermissionDeniedError"),
    errors.QuotaExceeded: (403, "QuotaExceededError"),
    errors.UnknownAdapter: (404, "NotFoundError"),
    errors.UnknownRoute: (404, "NotFoundError"),
    errors.AdapterNotFound: (404, "NotFoundError"),
    UploadTimeout: (408, "RequestTimeoutError"),
    errors.AlreadyLoaded: (409, "ConflictError"),
    errors.ChangedMeanwhile: (409, "ConflictError"),
    TooLarge: (413, "RequestTooLargeError"),
    TooManyUploads: (429, "RateLimitError"),
    UsageError: (400, "InvalidUserInput"),
    errors.PolicyError: (400, "InvalidUserInput"),
    errors.CheckpointError: (400, "InvalidUserInput"),
    errors.KeysError: (400, "InvalidUserInput"),
    errors.Unavailable: (503, "ServiceUnavailableError"),
    GateUnavailable: (503, "ServiceUnavailableError"),
    errors.MalformedMessage: (503, "ServiceUnavailableError"),
    errors.StoreUnavailable: (503, "ServiceUnavailableError"),
    errors.EngineUnavailable: (503, "ServiceUnavailableError"),
    errors.ExamUnavailable: (503, "ServiceUnavailableError"),
    errors.StoreDamaged: (503, "ServiceUnavailableError"),
    errors.GuardError: (503, "ServiceUnavailableError"),
    NotServing: (503, "ServiceUnavailableError"),
    ProjectorCacheError: (500, "InternalServerError"),
    SafeLoRAError: (500, "InternalServerError"),
}


def answered(error: SafeLoRAError, who: Principal | None = TENANT) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer that this caller gets."""
    with acting_as(who):
        answer = error_response(error)
    return answer.status_code, json.loads(bytes(answer.body))["error"]


def told(message: str) -> str:
    """What a tenant reads where the server says this."""
    return str(answered(ProjectorCacheError(message))[1]["message"])


@pytest.mark.parametrize("kind", STATUSES, ids=lambda kind: kind.__name__)
def test_every_error_has_its_status_and_those_of_the_server_show_no_path(kind: type[SafeLoRAError]) -> None:
    status, name = STATUSES[kind]
    message = "/srv/store/x.json cannot be used"
    hidden = "(a path) cannot be used" if status >= 500 else message
    for who, shown in ((TENANT, hidden), (UNAUTHENTICATED, hidden), (None, hidden), (ADMIN, message)):
        expected = {"message": shown, "type": name, "param": None, "code": status}
        assert answered(kind(message), who) == (status, expected), who


def test_every_exception_of_the_package_is_in_the_table_above() -> None:
    known = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SafeLoRAError)
    }
    assert known - set(STATUSES) == {AdapterRefused}


def test_a_refusal_has_its_codes_and_sentences() -> None:
    refusal = AdapterRefused([Reason("a", "one"), Reason("b", "two"), Reason("a", "three")])
    status, body = answered(refusal)
    assert (status, body["type"], body["reasons"]) == (
        422,
        "AdapterRefusedError",
        [{"code": code, "message": said} for code, said in (("a", "one"), ("b", "two"), ("a", "three"))],
    )


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [(TooManyUploads, "1"), (GateUnavailable, "2"), (errors.ExamUnavailable, "30"), (UsageError, None)],
)
def test_when_to_come_back(kind: type[SafeLoRAError], seconds: str | None) -> None:
    assert error_response(kind("x")).headers.get("Retry-After") == seconds


def test_another_method_is_answered_with_those_that_the_caller_may_use() -> None:
    answer = error_response(MethodNotAllowed("PUT", "/v1/models", ["GET", "HEAD"]))
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert "Allow" not in error_response(UsageError("x")).headers


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("/srv/p", "(a path)"),
        ("no /srv/p/x here", "no (a path) here"),
        ("No such file or directory: '/srv/p/x'", "No such file or directory: '(a path)'"),
        ('No such file: "/srv/p/x".', 'No such file: "(a path)".'),
        ("the shard (/srv/b) is gone", "the shard ((a path)) is gone"),
        ("shards ['/srv/a', '/srv/b']", "shards ['(a path)', '(a path)']"),
        ("[/srv/a,/srv/b]: gone", "[(a path)]: gone"),
        ("store=/srv/a; file:/srv/b", "store=(a path); file:(a path)"),
        ("bytes b'/srv/a'", "bytes b'(a path)'"),
        ("`/srv/a`, </srv/b>, {/srv/c}", "`(a path)`, <(a path)>, {(a path)}"),
        ("'/srv/my models/x' and \"/srv/it's mine/y\"", "'(a path)' and \"(a path)\""),
        ("in '/srv/it's/x'", "in '(a path)'"),
        ("in '/srv/p", "in '(a path)"),
        ("/srv/p's shard", "(a path) shard"),
        ("a\n/srv/p\nb", "a\n(a path)\nb"),
        ("~/store/x, ./store/y, ../z", "~(a path), .(a path), ..(a path)"),
        ("//srv/p and ///srv", "(a path) and (a path)"),
        ("--keys=/etc/keys.toml: mode 0644", "--keys=(a path): mode 0644"),
        ("file:///srv/p, safelora://abc", "(an address), (an address)"),
        ("the bucket s3://bucket/safelora cannot be read", "the bucket (an address) cannot be read"),
        ("no bucket 's3://bucket/x'.", "no bucket '(an address)'."),
        # Names of adapters, numbers and words have slashes too.
        ("acme/x is damaged; restore and/or repeat, 3/4 done", None),
        ("the published copy of 'acme/x' was lost", None),
        ("no path at all", None),
    ],
)  # fmt: skip
def test_paths_are_masked_wherever_they_stand(message: str, expected: str | None) -> None:
    assert told(message) == (message if expected is None else expected)


def test_the_log_has_what_callers_are_not_told_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.safelora.http")
    message = "100 %s of /srv/store is damaged"
    for kind in (ProjectorCacheError, UsageError):
        answered(kind(message))
    answered(ProjectorCacheError("an admin reads this in the answer"), ADMIN)
    logged = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert logged == [("vllm.safelora.http", "ERROR", message)]


def test_errors_that_are_documented_have_their_form_in_the_schema() -> None:
    app = FastAPI()
    app.add_api_route("/x", lambda: None, responses=documented(404, 422))
    answers = app.openapi()["paths"]["/x"]["get"]["responses"]
    for status in ("404", "422"):
        assert answers[status]["content"]["application/json"]["schema"] == {
            "$ref": "#/components/schemas/ErrorBody"
        }


def gone(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()


def damaged(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(b"x")


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [gone, damaged, no_manifest])
@pytest.mark.parametrize("folder", ["plain", "with a space", "it's"])
def test_a_projector_cache_that_is_damaged_shows_no_folder(
    damage: Callable[[Path], None], folder: str, cache: ProjectorCache, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    copy = Path(shutil.copytree(cache.folder, tmp_path / folder))
    opened = ProjectorCache(copy)
    damage(copy)
    with pytest.raises(ProjectorCacheError) as error:
        ProjectorCache(copy) if damage is no_manifest else opened.projector(Q0).energies
    with caplog.at_level(logging.ERROR, "vllm.safelora"):
        status, body = answered(error.value)
    assert status == 500 and str(tmp_path) not in body["message"] and "(a path)" in body["message"]
    assert str(copy) in str(error.value) and str(error.value) in caplog.text, (
        "the operator reads it in the log"
    )


def test_what_safetensors_says_shows_no_folder(tmp_path: Path) -> None:
    with pytest.raises((OSError, SafetensorError)) as error, safe_open(tmp_path / "none", framework="pt"):
        pass
    assert str(tmp_path) in str(error.value) and str(tmp_path) not in told(str(error.value))
