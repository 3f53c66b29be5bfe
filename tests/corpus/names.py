"""Names under which a sound adapter is loaded."""

from __future__ import annotations

from tests.corpus.case import NAME, TAKEN, Hostile
from tests.corpus.target import sound

NAMES = {
    "empty": "",
    "slash": "a/b/c",
    "slash-before": "/a",
    "slash-behind": "a/",
    "dots": "..",
    "one-dot": ".",
    "traversal": "../../etc/passwd",
    "traversal-within": "a/../b",
    "backslashes": "..\\..\\a",
    "percent": "%2e%2e%2fa",
    "newline": "a\nb",
    "newline-behind": "a\n",
    "carriage-return": "a\rERROR 00-00 00:00:00 [gate] adapter 'a' accepted",
    "escape": "a\x1b[2Jb",
    "zero-byte": "a\0b",
    "surrogate": "a\ud800b",
    "right-to-left": "a\u202eb",
    "zero-width": "aligned\u200b",
    "homoglyph": "аligned",  # its first letter is Cyrillic
    "space": "a b",
    "space-before": " a",
    "option": "--a",
    "129-characters": "a" * 129,
    "10-kB": "a" * 10_000,
    "route-policy": "a/policy",
    "route-versions": "a/versions",
    "quotes": "a'\"b",
    "label": 'a"} 1\nsafelora_enforcing{x="',
    "markup": "<script>alert(1)</script>",
    "template": "${jndi:ldap://a}",
    "published": "safelora://" + "0" * 64,
}
# What only a server knows: its model's name, and an adapter's that it was started with.
TAKEN_NAMES = {"base-model": "aligned", "other-tenant": "static"}


def _named(name: str, code: str, served_as: str) -> Hostile:
    return Hostile(
        f"name-{name}",
        "names",
        lambda folder, target: sound(target).write(folder),
        frozenset({code}),
        served_as=served_as,
    )


CASES = [
    *[_named(name, NAME, served_as) for name, served_as in NAMES.items()],
    *[_named(name, TAKEN, served_as) for name, served_as in TAKEN_NAMES.items()],
]
