"""Addresses of remote sources: one spelling each, prefixes by whole parts, and which networks are public."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from safelora_vllm.errors import AdapterRefused, UsageError
from safelora_vllm.remote.address import allowed, is_remote, parse, parse_prefix
from safelora_vllm.remote.reach import Reach, is_public


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a/b.tar.gz", "gs://bucket-1.x/a", "az://container/a b".replace(" ", "+"),
        "https://host.example/a.zip", "https://host.example:8443/a/b", "https://192.0.2.1/a.tar",
        "https://[2001:db8::1]:8443/a.tar",
        "https://host.example/a%20b.tar", "https://xn--bcher-kva.example/a",
    ],
)  # fmt: skip
def test_an_address_is_written_as_it_was_given(text: str) -> None:
    assert str(parse(text)) == text and is_remote(text)


def test_a_query_is_shown_nowhere() -> None:
    source = parse("https://host.example/a?X-Amz-Signature=secret")
    assert source.query == "X-Amz-Signature=secret" and source.is_archive
    assert "secret" not in f"{source} {source!r}"


MALFORMED = [
    "http://host.example/a", "file:///etc/passwd", "ftp://host/a", "S3://bucket/a", "s3:/bucket/a", "gopher://x/a",
    "https://user:password@host.example/a", "https://user@host.example/a", "https://allowed.example@evil.example/a",
    "https://host.example\\@evil.example/a", "https://host.example#@evil.example/a", "https://host.example/a#b",
    "https://2130706433/a", "https://0x7f000001/a", "https://0x7f.1/a", "https://127.1/a", "https://0177.0.0.1/a",
    "https://127.0.0.1./a", "https://[::1%25lo]/a", "https://[fe80::1%eth0]/a", "https://[::1/a", "https://::1/a",
    "https://host.example:0/a", "https://host.example:65536/a", "https://host.example:/a", "https://host.example:8o/a",
    "https://host.example:٨٠/a", "https://bücher.example/a", "https://ⓛocalhost/a", "https://host。example/a",
    "https:///a", "https://.example/a", "https://host..example/a",
    "https://host.example/a/../b", "https://host.example/a/%2e%2e/b", "https://host.example/a%2Fb",
    "https://host.example/a%5cb", "https://host.example/a%252e", "https://host.example/a//b", "https://host.example/a%00",
    "https://host.example/a b", "https://host.example/a\r\nHost: evil.example", "https://host.example/a%0d%0aX",
    "https://host.example/a?x=\n", "https://host.example/a/..;/b", "https://host.example/a/..;x=y/b", "https://host.example/a/.;/b",
    "https://host.example/a/;x/b", "https://host.example/a/..%3b/b", "https://host.example/a/%c0%ae%C0%AE/b",
    "https://host.example/a%c1%9cb", "https://host.example/a/%e0%80%ae/b", "https://host.example/a/%f0%80%80%ae/b",
    "s3://bucket/../other/a", "s3://bucket/a/./b", "s3://bucket/a%2e", "s3://bucket/a?b",
    "s3://bucket/a#b", "s3://Bucket/a", "s3:///a", "s3://b/a", "s3://user@bucket/a", "s3://bucket:80/a", "s3://bu/a",
    "https://host.example/" + "a" * 4096,
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_an_address_that_can_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(AdapterRefused) as refused:
        parse(text)
    assert refused.value.codes == ["source_malformed"]
    assert "password" not in str(refused.value).replace("a user or password is not read", "")


@pytest.mark.parametrize(
    ("text", "prefix", "expected"),
    [
        ("s3://bucket/acme/a", "s3://bucket/acme", True), ("s3://bucket/acme/a", "s3://bucket/acme/", True),
        ("s3://bucket/acme-evil/a", "s3://bucket/acme", False), ("s3://bucket/a", "s3://bucket", True),
        ("s3://bucket-evil/a", "s3://bucket", False), ("gs://bucket/a", "s3://bucket", False),
        ("https://host.example/a", "https://host.example", True),
        ("https://host.example:444/a", "https://host.example", False),
        ("https://host.example:443/a", "https://host.example", True),
        ("https://HOST.example/a", "https://host.example", True),
        ("https://host.example.evil.example/a", "https://host.example", False),
        ("https://host.example/A", "https://host.example/a", False),
    ],
)  # fmt: skip
def test_prefixes_allow_whole_parts(text: str, prefix: str, expected: bool) -> None:
    assert allowed(parse(text), [parse_prefix(prefix)]) is expected
    assert not allowed(parse(text), [])


@pytest.mark.parametrize(
    "text", ["s3://", "https://", "*", "https://*.example/", "s3://*/", "https://h/?a=b", "/srv"]
)
def test_what_is_not_a_prefix(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid prefix"):
        parse_prefix(text)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "100.100.100.200",        "0.0.0.0", "224.0.0.1", "255.255.255.255",
        "240.0.0.1", "168.63.129.16", "192.0.0.192", "198.18.0.1",
        "192.0.2.1",         "::", "::1", "fe80::1", "fe80::1%eth0",
        "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1", "2002:7f00:1::", "2001::1",
    ],
)  # fmt: skip
def test_addresses_that_lead_inside(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f::1", "::ffff:93.184.215.14", "64:ff9b::5db8:d70e"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def _resolver(*addresses: str) -> Any:
    return lambda _host, port, **_: [(socket.AF_INET, 0, 0, "", (address, port)) for address in addresses]


def test_one_forbidden_address_among_others_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolver("93.184.215.14", "10.0.0.1"))
    with pytest.raises(AdapterRefused) as refused:
        Reach().resolve("https", "host.example", 443, "https://host.example/a")
    assert refused.value.codes == ["source_address"]
    assert "10.0.0.1" not in str(refused.value), "it would tell of the network inside"


def test_the_operators_endpoints_only_by_scheme_host_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolver("10.0.0.1"))
    reach = Reach.to(["http://minio.storage:9000", "https://inside.example"])
    assert reach.resolve("http", "minio.storage", 9000, "x") == [("10.0.0.1", 9000)]
    assert reach.resolve("https", "inside.example", 443, "x") == [("10.0.0.1", 443)]
    for other in [
        ("http", "minio.storage", 9001),
        ("http", "inside.example", 443),
        ("https", "minio.storage", 9000),
    ]:
        with pytest.raises(AdapterRefused):
            reach.resolve(*other, "x")


@pytest.mark.parametrize(
    "text", ["minio:9000", "http://minio:9000/path", "http://u@minio", "http://minio:0", "s3://a"]
)
def test_what_is_not_an_endpoint(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid endpoint"):
        Reach.to([text])
