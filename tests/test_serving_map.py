"""Names that cannot be served now: who asks for them is told, and leaves nothing behind."""

from __future__ import annotations

import pytest

from safelora_vllm.errors import GateUnavailable, refuse
from safelora_vllm.integration.server.visibility import ServingMap


def test_asking_for_an_unavailable_name_keeps_nothing() -> None:
    served = ServingMap()
    served.unavailable = {"late": GateUnavailable("later"), "bad": refuse("nan", "a NaN")}
    for name, problem in served.unavailable.items():
        for _ in range(3):
            with pytest.raises(type(problem), match=str(problem).replace("[", r"\[")):
                assert name in served
        assert problem.__traceback__ is None, "frames of requests would be kept with it"
