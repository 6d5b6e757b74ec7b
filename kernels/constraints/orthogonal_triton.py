"""The Triton lines of the Cayley transform: Gauss-Jordan elimination, each entry a variable.

It needs no pivoting: the symmetric part of I + A is I, and that of every Schur complement is no
smaller. So pivots are at least 1, up to rounding, which must not make one 0. Pivots of 1 beside
entries of many cost digits; a step of Newton gets them back.
"""

from collections.abc import Iterator

from mhc_compile.kernels.triton.text import assign, call, function, numbered, pack


def orthogonal_triton(n: int) -> str:
    """Definitions of ``matrix`` and ``matrix_backward``, see `Constraint.triton`."""
    h, g = numbered("h", n * (n - 1) // 2), numbered("g", n * n)
    functions = (
        function("invert", h, "B by Gauss-Jordan elimination, in place.", _invert(n)),
        function("matrix", h, "H_res = 2 B - I.", _matrix(h, n)),
        function("matrix_backward", [*g, *h], "dA = -2 B^T dH B^T.", _backward(h, n)),
    )
    title = "# H_res = (I - A)(I + A)^-1 = 2 B - I with B = (I + A)^-1, A skew-symmetric.\n"
    return title + "\n\n".join(functions)


def _upper(n: int) -> list[tuple[int, int]]:
    """Where the logits stand in A."""
    return [(i, j) for i in range(n) for j in range(i + 1, n)]


def _invert(n: int) -> Iterator[str]:
    entries = {(i, i): "1.0" for i in range(n)}
    for k, (i, j) in enumerate(_upper(n)):
        entries[i, j], entries[j, i] = f"h{k}", f"-h{k}"
    yield from (f"b{i * n + j} = {entries[i, j]}" for i, j in sorted(entries))
    for k in range(n):
        others = [j for j in range(n) if j != k]
        yield f"pivot = 1.0 / tl.maximum(b{k * n + k}, 1.0)"
        yield from (f"b{k * n + j} = b{k * n + j} * pivot" for j in others)
        for i in others:
            yield f"factor = b{i * n + k}"
            yield from (f"b{i * n + j} = b{i * n + j} - factor * b{k * n + j}" for j in others)
            yield f"b{i * n + k} = -factor * pivot"
        yield f"b{k * n + k} = pivot"
    yield "# Newton: B (2 I - (I + A) B)."
    for i in range(n):
        for j in range(n):
            terms = (f"({entries[i, k]}) * b{k * n + j}" for k in range(n))
            yield from assign(f"e{i * n + j}", terms)
    rest = [f"({'2.0' if i == j else '0.0'} - e{i * n + j})" for i in range(n) for j in range(n)]
    for i in range(n):
        for j in range(n):
            yield from assign(
                f"c{i * n + j}", (f"b{i * n + k} * {rest[k * n + j]}" for k in range(n))
            )
    yield from pack("return", numbered("c", n * n))


def _matrix(h: list[str], n: int) -> Iterator[str]:
    yield from call("b = invert", h)
    diagonal = range(0, n * n, n + 1)
    entries = (f"2.0 * b[{k}]" + " - 1.0" * (k in diagonal) for k in range(n * n))
    yield from pack("return", entries)


def _backward(h: list[str], n: int) -> Iterator[str]:
    """The gradient of a logit is dA above the diagonal less dA below."""
    yield from call("b = invert", h)
    for i in range(n):
        for j in range(n):
            terms = (f"b[{k * n + i}] * g{k * n + j}" for k in range(n))
            yield from assign(f"c{i * n + j}", terms)
    for k, (i, j) in enumerate(_upper(n)):
        yield from assign(f"up{k}", (f"c{i * n + q} * b[{j * n + q}]" for q in range(n)))
        yield from assign(f"down{k}", (f"c{j * n + q} * b[{i * n + q}]" for q in range(n)))
    yield from pack("return", (f"-2.0 * (up{k} - down{k})" for k in range(len(h))))
