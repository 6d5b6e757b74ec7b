"""Bytes that the ops have to move, counted in rows.

A row is one stream of one token: its C channels. Every tensor of streams is read or written once at
the least, whatever computes the op. With n streams a state is n rows, and u, f and their gradients
are one each. The mappings are left out: at n = 4 they are 20 float32 numbers per token and site,
of which a row at C = 1280 in bfloat16 holds 32 times as many.
"""

from mhc_compile.kernels.spec import REPLAYED


def least_rows(streams: int) -> dict[str, int]:
    """The compulsory rows per token of every op; of a replay for as many sites as one kernel takes.

    >>> least_rows(4)["seam"], least_rows(4)["seam_backward"]
    (10, 15)
    """
    n = streams
    return {
        "pre": n + 1,  # X -> u
        "pre_backward": n + 1 + n,  # X, du -> dX
        "pre_backward, more": n + 1 + 2 * n,  # X, du, what else X gets -> dX
        "pre_backward_dz": n + 1 + n,
        "phi_backward": n,  # X
        "post": n + 1 + n,  # X, f -> X'
        "mix": n + n,  # X -> H_res X
        "post_backward": 2 * n + 1 + n + 1,  # dX', X, f -> dX, df
        "read": n + 1,  # X -> u
        "read_backward": n + 1 + n,  # X, du -> dX
        "post_backward_branch": n + 1,  # dX' -> df
        "post_backward_state": 2 * n + 1 + n,  # dX', X, f -> dX
        "seam": n + 1 + n + 1,  # X, f -> X', u
        "seam_backward": 2 * n + 2 + n + 1,  # dX', du, X, f -> dX, df
        "seam_backward_dz": 2 * n + 2 + n + 1,
        "phi_backward, seam": n + 1,  # X, f
        "seam_norm": n + 1 + n + 1,  # X, f -> X', norm(u)
        "seam_norm_backward": 2 * n + 2 + n + 1,
        "replay": n + 1 + REPLAYED * (n + 2),  # X, some f -> as many X', u, and that of X
        "collapse": n + 1,  # X -> x
        "learned collapse": n + 1,  # X -> x
        "learned collapse backward": n + 1 + n,  # X, dx -> dX
    }
