"""Why a bucket did not do what it was asked for, in words of this package.

The text of obstore's errors may hold a signature, an address inside, or whatever the other side wrote. So it
is only searched, and nothing of it is repeated but a status.
"""

from __future__ import annotations

import re

_LATER = "try again later"
_RIGHTS = "check the credentials in the environment and their rights: docs/remote-sources.md"
# The first that is found counts. A pattern, the cause, and what to do.
_CAUSES = tuple(
    (re.compile(pattern), cause, cure)
    for pattern, cause, cure in (
        (r"BadScheme", "its endpoint has no TLS", "set AWS_ALLOW_HTTP=true, or give an https:// endpoint"),
        (r"Account must be specified", "the account is not known", "set AZURE_STORAGE_ACCOUNT_NAME"),
        (
            r"169\.254\.169\.254|metadata\.google\.internal",
            "there are no credentials, neither in the environment nor from the machine's metadata service",
            _RIGHTS,
        ),
        (r"NoSuchBucket|ContainerNotFound", "there is no such bucket", "create it, or correct its address"),
        (r"BareRedirect|status code: 30", "it is in another region or place", "set AWS_REGION to its region"),
        (r"status code: 40[13]\b", "access was denied", _RIGHTS),
        (
            r"status code: 501\b",
            "it does not know writes on condition (If-Match)",
            "use a storage that does: docs/store.md",
        ),
        (r"kind: Connect\b", "its endpoint was not reached", "check the endpoint, or try again later"),
        (r"kind: Timeout\b", "it did not answer in time", _LATER),
    )
)
_STATUS = re.compile(r"status code: ([0-9]{3})\b")


def because(error: Exception) -> str:
    """The cause of an error of obstore's, and what to do about it."""
    text = str(error)
    for pattern, cause, cure in _CAUSES:
        if pattern.search(text):
            return f"{cause}; {cure}"
    if status := _STATUS.search(text):
        return f"it answered status {status[1]}; {_LATER}"
    return f"{type(error).__name__}; {_LATER}"
