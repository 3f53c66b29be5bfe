"""What ``--additional-config`` may say."""

from __future__ import annotations

from typing import Any

import pytest

from safelora_vllm.errors import GuardError
from safelora_vllm.settings import ServerSettings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"projectors": 5}, "projectors"), ({"policy": None}, "policy"), ({"policy": []}, "policy"),
        ({"projector_bytes": "x"}, "projector_bytes"), ({"projector_bytes": True}, "projector_bytes"),
        ({"allow_hub": "no"}, "allow_hub"), ({"adapter_roots": "/data"}, "adapter_roots"),
        ({"nonsense": 1}, "nonsense"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(GuardError, match=named):
        ServerSettings.from_additional_config({"safelora": {"projectors": "p", **values}})


def test_a_section_comes_back_from_what_it_says() -> None:
    settings = ServerSettings("p", policy={"energy": 0.3}, adapter_roots=["a"], store_bytes=5)
    assert ServerSettings.from_additional_config(settings.to_section()) == settings
