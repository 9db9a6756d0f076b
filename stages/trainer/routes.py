"""Two choices of experts for the same tokens, compared."""

from torch import Tensor


def other_experts(first: Tensor, second: Tensor) -> Tensor:
    """bool [...]: where two choices int [..., k] are other experts, in whatever order."""
    return (first.sort(-1).values != second.sort(-1).values).any(-1)
