"""What a module's build costs, relative to another's."""

from __future__ import annotations

from collections.abc import Sequence


def operations(shape: Sequence[int]) -> int:
    """Of V (d_out, d_in), up to a factor: its smaller Gram matrix, and what is done with that.

    For all singular vectors that is an eigendecomposition; for the dominant ones an iteration, whose columns
    are about a constant share of the smaller side.
    """
    return min(shape) ** 2 * sum(shape)
