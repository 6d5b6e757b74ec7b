"""What keeps generated kernels of any kind from an op."""

import torch


def rounding_obstacle(
    X: torch.Tensor, *tensors: torch.Tensor | None, branch: torch.Tensor | None = None
) -> str | None:
    """Why kernels that compute in float32 would lose digits of these arguments; None if not.

    Args:
        X: the state.
        tensors: the other floating point arguments, where there.
        branch: the branch output, which must not be rounded before it is added.
    """
    if any(t is not None and t.dtype == torch.float64 for t in (*tensors, branch)):
        return "an argument is float64"
    if branch is not None and torch.promote_types(branch.dtype, X.dtype) != X.dtype:
        return f"the branch output is {branch.dtype}, wider than its streams"
    return None
