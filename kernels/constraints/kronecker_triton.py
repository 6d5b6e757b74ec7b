"""The Triton lines of the Kronecker product: v by its factors, and out by XOR."""

from collections.abc import Iterator

from mhc_compile.kernels.triton.text import assign, function, numbered, pack


def kronecker_triton(n: int) -> str:
    """Definitions of ``matrix`` and ``matrix_backward`` for n = 2^K streams.

    See `Constraint.triton`; the logits of factor k are 2k (keep) and 2k + 1 (swap).
    """
    h, g = numbered("h", 2 * _factors(n)), numbered("g", n * n)
    functions = (
        function("matrix", h, "H_res[i, j] = v[i ^ j].", _matrix(n)),
        function("matrix_backward", [*g, *h], "Through v and its factors.", _backward(n)),
    )
    title = "# v: the product of all softmax(h_k), weights to keep and to swap; arXiv 2601.21579.\n"
    return title + "\n\n".join(functions)


def _factors(n: int) -> int:
    return n.bit_length() - 1


def _digit(x: int, k: int, n: int) -> int:
    """Whether entry x of v has factor k swapped."""
    return x >> (_factors(n) - 1 - k) & 1


def _product(x: int, n: int, without: int | None = None) -> str:
    """Entry x of v, or its other factors."""
    kept = [k for k in range(_factors(n)) if k != without]
    return " * ".join(f"{('keep', 'swap')[_digit(x, k, n)]}{k}" for k in kept) or "1.0"


def _weights(n: int) -> Iterator[str]:
    for k in range(_factors(n)):
        yield f"keep{k} = tl.sigmoid(h{2 * k} - h{2 * k + 1})"
        yield f"swap{k} = tl.sigmoid(h{2 * k + 1} - h{2 * k})"


def _matrix(n: int) -> Iterator[str]:
    yield from _weights(n)
    yield from (f"v{x} = {_product(x, n)}" for x in range(n))
    yield from pack("return", (f"v{i ^ j}" for i in range(n) for j in range(n)))


def _backward(n: int) -> Iterator[str]:
    yield from _weights(n)
    for x in range(n):
        yield from assign(f"s{x}", (f"g{i * n + (i ^ x)}" for i in range(n)))
    grads = []
    for k in range(_factors(n)):
        for digit, name in enumerate(("keep", "swap")):
            terms = (f"s{x} * ({_product(x, n, k)})" for x in range(n) if _digit(x, k, n) == digit)
            yield from assign(f"d{name}{k}", terms)
        yield f"d{k} = keep{k} * swap{k} * (dkeep{k} - dswap{k})"
        grads += [f"d{k}", f"-d{k}"]
    yield from pack("return", grads)
