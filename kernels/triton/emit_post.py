"""Text of the kernels of ``mhc::post``: one token a program, its coefficients scalars.

The pieces that mix streams, tile by tile, serve the seam kernels too: there a coefficient is a
column over tokens instead, and the same expressions hold.
"""

from collections.abc import Iterator

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.text import Kernel, assign, loop


def post_kernels(spec: SiteSpec) -> list[Kernel]:
    """``post``, of which H_res X also alone, and ``post_backward``, this also in two parts."""
    mixing = [_mix(spec)] if constraint_of(spec).mixes else []
    backward = [_post_backward(spec, branch) for branch in (True, False)]
    return [_post(spec), *mixing, *backward, _post_backward_branch(spec)]


def stream(base: str, j: int) -> str:
    """Where stream ``j`` lies in the state at ``base``."""
    return f"{base} + {f'{j} * C' if j > 1 else 'C'}" if j else base


def load_streams(n: int, base: str, name: str, live: str = "live") -> Iterator[str]:
    """The n streams at ``base`` as float32 tiles ``{name}0``, ``{name}1``, ..."""
    for j in range(n):
        yield f"{name}{j} = read({stream(base, j)}, {live})"


def load_mappings(spec: SiteSpec, token: str, read: str) -> Iterator[str]:
    """H_post as ``p0``, ... and H_res as ``r0``, ..., row-major [out, in].

    Args:
        spec: the site; static mappings are the same for every token.
        token: the token's number, as text.
        read: a format with a place for the pointer.
    """
    for i in range(spec.streams):
        yield from load_row(spec, i, token, read)


def load_row(spec: SiteSpec, i: int, token: str, read: str) -> Iterator[str]:
    """Of `load_mappings` those that X'_i is made with."""
    post = f"H_POST + {token} * {spec.gates}" if spec.dynamic else "H_POST"
    yield f"p{i} = {read.format(f'{post} + {spec.gates - spec.streams + i}')}"
    if constraint_of(spec).mixes:
        yield from _load_row_of_matrix(spec, i, token, read)


def _load_row_of_matrix(spec: SiteSpec, i: int, token: str, read: str) -> Iterator[str]:
    n = spec.streams
    res = f"H_RES + {token} * {n * n}" if spec.dynamic else "H_RES"
    for e in range(i * n, i * n + n):
        yield f"r{e} = {read.format(f'{res} + {e}')}"


def given_weight(spec: SiteSpec, gates: str, i: int) -> str:
    """Where a single pass finds H_pre[i] of the site before."""
    return f"{gates} + t * {spec.gates} + {i}"


def carried(spec: SiteSpec, i: int) -> list[str]:
    """Terms of ``X'_i = sum_j H_res[i, j] X_j + H_post[i] f``."""
    terms = mixed(spec, i) if constraint_of(spec).mixes else [f"x{i}"]
    return [*terms, f"p{i} * f"]


def mixed(spec: SiteSpec, i: int) -> list[str]:
    """Terms of ``M_i = sum_j H_res[i, j] X_j``."""
    n = spec.streams
    return [f"r{i * n + j} * x{j}" for j in range(n)]


def returned(spec: SiteSpec, j: int) -> list[str]:
    """Terms of ``dX_j = sum_i H_res[i, j] dX'_i``."""
    n = spec.streams
    return [f"r{i * n + j} * g{i}" for i in range(n)] if constraint_of(spec).mixes else [f"g{j}"]


def branch_returned(spec: SiteSpec) -> list[str]:
    """Terms of ``df = sum_i H_post[i] dX'_i``."""
    return [f"p{i} * g{i}" for i in range(spec.streams)]


def products(spec: SiteSpec, i: int) -> list[tuple[str, str]]:
    """Names, and factors, of the products of dX'_i whose sums are gradients of the mappings.

    ``q{i}`` belongs to H_post[i] and ``s{i * n + j}`` to H_res[i, j].
    """
    n = spec.streams
    mixed = [(f"s{i * n + j}", f"x{j}") for j in range(n)] if constraint_of(spec).mixes else []
    return [*mixed, (f"q{i}", "f")]


def store_streams(n: int, base: str, name: str, live: str = "live") -> Iterator[str]:
    """Store tiles ``{name}0``, ... as the n streams at ``base``."""
    for j in range(n):
        yield f"tl.store({stream(base, j)}, {name}{j}, mask={live})"


def store_products(spec: SiteSpec, post: str, res: str, value: str) -> Iterator[str]:
    """Store the sums of all `products`; ``value`` is a format with a place for the name."""
    n = spec.streams
    for i in range(n):
        yield f"tl.store({post} + {i}, {value.format(f'q{i}')})"
    if constraint_of(spec).mixes:
        for e in range(n * n):
            yield f"tl.store({res} + {e}, {value.format(f's{e}')})"


def block_of_one_token(n: int) -> Iterator[str]:
    """The token and the channels of a program that owns a block of one token."""
    yield "t = tl.program_id(0).to(tl.int64)"
    yield "c = tl.program_id(1) * BC + tl.arange(0, BC)"
    yield "live = c < C"
    yield f"row = t * ({n} * C) + c"


def _post(spec: SiteSpec) -> Kernel:
    n = spec.streams

    def body() -> Iterator[str]:
        yield from block_of_one_token(n)
        yield from load_streams(n, "X + row", "x")
        yield "f = read(F + t * C + c, live)"
        yield from load_mappings(spec, "t", "tl.load({})")
        for i in range(n):
            yield from assign(f"y{i}", carried(spec, i))
        yield from store_streams(n, "Y + row", "y")

    return Kernel(
        name="post",
        comment="X'_i = sum_j H_res[i, j] X_j + H_post[i] f. One token, BC channels a program.",
        streams=("X", "F", "Y"),
        floats=("H_POST", "H_RES"),
        constants=("C", "BC"),
        body=tuple(body()),
    )


def _mix(spec: SiteSpec) -> Kernel:
    n = spec.streams

    def body() -> Iterator[str]:
        yield from block_of_one_token(n)
        yield from load_streams(n, "X + row", "x")
        for i in range(n):
            yield from _load_row_of_matrix(spec, i, "t", "tl.load({})")
        for i in range(n):
            yield from assign(f"y{i}", mixed(spec, i))
        yield from store_streams(n, "Y + row", "y")

    return Kernel(
        name="mix",
        comment="M_i = sum_j H_res[i, j] X_j. One token, BC channels a program.",
        streams=("X", "Y"),
        floats=("H_RES",),
        constants=("C", "BC"),
        body=tuple(body()),
    )


def _post_backward(spec: SiteSpec, branch: bool) -> Kernel:
    n = spec.streams
    sums = [name for i in range(n) for name, _ in products(spec, i)]

    def step() -> Iterator[str]:
        yield "c = start + tl.arange(0, BC)"
        yield "live = c < C"
        yield f"row = t * ({n} * C) + c"
        yield from load_streams(n, "DY + row", "g")
        yield from load_streams(n, "X + row", "x")
        yield "f = read(F + t * C + c, live)"
        for j in range(n):
            yield from assign(f"dx{j}", returned(spec, j))
        yield from store_streams(n, "DX + row", "dx")
        if branch:
            yield from assign("df", branch_returned(spec))
            yield "tl.store(DF + t * C + c, df, mask=live)"
        for i in range(n):
            for name, factor in products(spec, i):
                yield f"{name} += by_vector(g{i} * {factor}, BC)"

    def body() -> Iterator[str]:
        yield "t = tl.program_id(0).to(tl.int64)"
        yield from load_mappings(spec, "t", "tl.load({})")
        yield from (f"{name} = tl.zeros([BC // VECTOR], tl.float32)" for name in sums)
        yield from loop("for start in range(0, C, BC)", step())
        gates = spec.gates if spec.dynamic else n  # of a static site, what is added over tokens
        post = f"DH_POST + t * {gates}"
        if gates > n:
            yield from (f"tl.store({post} + {i}, 0.0)" for i in range(n))
            post = f"{post} + {n}"
        yield from store_products(spec, post, f"DH_RES + t * {n * n}", "tl.sum({}, 0)")

    df = "df = sum_i H_post[i] dX'_i; " if branch else ""
    return Kernel(
        name="post_backward" if branch else "post_backward_state",
        comment=(
            f"dX_j = sum_i H_res[i, j] dX'_i; {df}dH_res[i, j] and\n"
            "dH_post[i] are the products of dX'_i with X_j and f. One token a program."
        ),
        streams=("DY", "X", "F", "DX", *(("DF",) if branch else ())),
        floats=("H_POST", "H_RES", "DH_POST", "DH_RES"),
        constants=("C", "BC"),
        body=tuple(body()),
    )


def _post_backward_branch(spec: SiteSpec) -> Kernel:
    n = spec.streams
    first = f"H_POST + t * {spec.gates}" if spec.dynamic else "H_POST"

    def body() -> Iterator[str]:
        yield from block_of_one_token(n)
        yield from load_streams(n, "DY + row", "g")
        yield from (f"p{i} = tl.load({first} + {spec.gates - n + i})" for i in range(n))
        yield from assign("df", branch_returned(spec))
        yield "tl.store(DF + t * C + c, df, mask=live)"

    return Kernel(
        name="post_backward_branch",
        comment="df = sum_i H_post[i] dX'_i. One token, BC channels a program.",
        streams=("DY", "DF"),
        floats=("H_POST",),
        constants=("C", "BC"),
        body=tuple(body()),
    )
