"""Exceptions that are kept and raised for every request that meets them."""

from __future__ import annotations

import pytest

from safelora_vllm.errors import AdapterRefused, GateUnavailable, Reason, SafeLoRAError, fresh_copy


@pytest.mark.parametrize(
    "kept", [GateUnavailable("later"), AdapterRefused([Reason("a", "one"), Reason("b", "two")])], ids=type
)
def test_raised_again_it_says_the_same_and_keeps_no_frames(kept: SafeLoRAError) -> None:
    for _ in range(3):
        with pytest.raises(type(kept)) as raised:
            raise fresh_copy(kept)
        assert raised.value is not kept and str(raised.value) == str(kept)
        assert vars(raised.value) == vars(kept)
    assert kept.__traceback__ is None


def test_a_refusal_without_a_reason_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match=r"^a refusal needs at least one reason$"):
        AdapterRefused([])
