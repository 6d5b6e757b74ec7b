"""The Triton lines of the permutations: a softmax, and each entry a sum of some of its weights."""

from collections.abc import Iterator, Sequence

from mhc_compile.kernels.triton.text import assign, call, function, items, numbered, pack


def permutations_triton(orders: Sequence[Sequence[int]]) -> str:
    """Definitions of ``matrix`` and ``matrix_backward``, see `Constraint.triton`.

    Args:
        orders: every permutation, as the column that holds the 1 of each row.
    """
    n, logits = len(orders[0]), len(orders)
    h, g = numbered("h", logits), numbered("g", n * n)
    functions = (
        function("softmax", h, "The weight of each permutation.", _softmax(h)),
        function(
            "matrix",
            h,
            "H_res[i, j]: the weights of those that take i to j.",
            _matrix(h, orders, n),
        ),
        function(
            "matrix_backward",
            [*g, *h],
            "Through the sums and the softmax.",
            _backward(h, orders, n),
        ),
    )
    title = "# H_res = sum_p softmax(h)_p P_p over all permutations, arXiv 2601.05732.\n"
    return title + "\n\n".join(functions)


def _softmax(h: list[str]) -> Iterator[str]:
    yield "top = h0"
    yield from (f"top = tl.maximum(top, {logit})" for logit in h[1:])
    yield from (f"w{p} = tl.exp({logit} - top)" for p, logit in enumerate(h))
    yield from assign("total", numbered("w", len(h)))
    yield from pack("return", (f"w{p} / total" for p in range(len(h))))


def _matrix(h: list[str], orders: Sequence[Sequence[int]], n: int) -> Iterator[str]:
    yield from call("w = softmax", h)
    for i in range(n):
        for j in range(n):
            chosen = (p for p, order in enumerate(orders) if order[i] == j)
            yield from assign(f"m{i * n + j}", items("w", chosen))
    yield from pack("return", numbered("m", n * n))


def _backward(h: list[str], orders: Sequence[Sequence[int]], n: int) -> Iterator[str]:
    yield from call("w = softmax", h)
    for p, order in enumerate(orders):
        yield from assign(f"s{p}", (f"g{i * n + j}" for i, j in enumerate(order)))
    yield from assign("dot", (f"w[{p}] * s{p}" for p in range(len(h))))
    yield from pack("return", (f"w[{p}] * (s{p} - dot)" for p in range(len(h))))
