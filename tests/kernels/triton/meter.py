"""Counts the bytes that Triton kernels move in the interpreter, and finds unsafe accesses.

Inside ``with Meter() as meter:`` every load and store of every launch is recorded, for each
argument of the kernel:

    compulsory  distinct bytes over the whole launch: what memory has to deliver or take, at least
    shared      distinct bytes of each program, summed: what passes between programs and L2 cache
    reread      distinct bytes that a program loads although this launch has stored them; they are
                left out of the two counts above and must be found in the cache

and for each launch what must be zero:

    races       bytes that two programs touch, one of them storing
    stray       lanes outside every tensor of the launch; they are not executed
    unfenced    bytes that a program loads after storing them without ``tl.debug_barrier()``: on a
                GPU another thread may have stored them

Torch operations in the region are listed with the bytes they read and write. Arguments that share a
storage count under the first one's name. Atomics are refused: generated kernels use none. There is
no cache and no time here, so all that can be stated are bytes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from tests.kernels.triton.interpreter import Builder, Handle

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_active: Meter | None = None
_FREE = {  # operations that move nothing
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense",
    "lift_fresh", "_unsafe_view", "resize_", "set_",
}  # fmt: skip


@dataclasses.dataclass
class Access:
    """Bytes of one argument's loads, or of its stores; see the module."""

    compulsory: int = 0
    shared: int = 0
    reread: int = 0


@dataclasses.dataclass
class Launch:
    """One launch of a kernel; see the module."""

    kernel: str
    programs: int = 0
    races: int = 0
    stray: int = 0
    unfenced: int = 0
    accesses: dict[tuple[str, str], Access] = dataclasses.field(default_factory=dict)
    """By argument and by "load" or "store"."""


class _Shadow:
    """Who touched each byte of one storage in a launch: 0 is nobody, programs count from 1."""

    def __init__(self, name: str, low: int, high: int) -> None:
        self.name, self.low, self.high = name, low, high
        self.loader, self.storer, self.stored_at = np.zeros((3, high - low), np.int32)
        self.many_loaders = np.zeros(high - low, bool)


class Meter(TorchDispatchMode):
    """Records every launch and torch operation inside its ``with`` block; see the module."""

    def __init__(self) -> None:
        super().__init__()
        _route_accesses()
        self.launches: list[Launch] = []
        self.eager: list[tuple[str, int]] = []
        """Torch operations, and the bytes they read and write."""
        self.launch: Launch | None = None
        self.barriers = 0
        self._shadows: list[_Shadow] = []

    def __enter__(self) -> Meter:
        global _active
        if _active is not None:
            raise RuntimeError("one Meter at a time")
        super().__enter__()
        _active = self
        return self

    def __exit__(self, *exc: Any) -> None:
        global _active
        _active = None
        super().__exit__(*exc)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if self.launch is None and not func.is_view and name not in _FREE:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            self.eager.append((name, sum(t.numel() * t.element_size() for t in tensors)))
        return result

    def moved(self, arguments: Iterable[str], kernel: str | None = None) -> int:
        """Compulsory bytes of these arguments, over all launches or those of one kernel."""
        names = set(arguments)
        return sum(
            access.compulsory
            for launch in self.launches
            if kernel in (None, launch.kernel)
            for (argument, _), access in launch.accesses.items()
            if argument in names
        )

    def check(self) -> None:
        """Raise AssertionError where an access was unsafe."""
        for launch in self.launches:
            faults = {name: getattr(launch, name) for name in ("races", "stray", "unfenced")}
            assert not any(faults.values()), f"{launch.kernel}: {faults}\n{self.table()}"

    def table(self, tokens: int = 1) -> str:
        """All counts as text, bytes divided by ``tokens``."""
        lines = []
        for launch in self.launches:
            lines.append(f"{launch.kernel}: {launch.programs} programs")
            for (argument, kind), access in launch.accesses.items():
                counts = dataclasses.asdict(access).items()
                shown = ", ".join(f"{name} {value / tokens:g}" for name, value in counts)
                lines.append(f"  {argument} {kind}: {shown}")
        lines += [f"torch {name}: {size / tokens:g}" for name, size in self.eager]
        return "\n".join(lines)

    def begin(self, kernel: str, arguments: Sequence[tuple[str, Any]]) -> None:
        """A launch begins; for the interpreter."""
        self.launch, self._shadows, self.barriers = Launch(kernel), _shadows(arguments), 0

    def end(self) -> None:
        """The launch ends; for the interpreter."""
        if self.launch is not None:
            self.launches.append(self.launch)
        self.launch = None

    def touch(self, pointers: Any, mask: Any, kind: str) -> Any:
        """Count one access of a tile, and return the mask of lanes that can be executed."""
        if self.launch is None:
            return mask.data
        address = np.asarray(pointers.data).astype(np.int64)
        live = np.broadcast_to(np.asarray(mask.data).astype(bool), address.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        known = np.zeros(address.shape, bool)
        for shadow in self._shadows:
            inside = live & (address >= shadow.low) & (address + size <= shadow.high)
            if inside.any():
                known |= inside
                first = np.unique(address[inside] - shadow.low)
                self._count(self.launch, shadow, first[:, None] + np.arange(size), kind)
        self.launch.stray += int((live & ~known).sum())
        return known

    def _count(self, launch: Launch, shadow: _Shadow, touched: Any, kind: str) -> None:
        """Programs run one after another, so the last visitor and "were there more" are enough."""
        me, at = launch.programs, touched.reshape(-1)
        access = launch.accesses.setdefault((shadow.name, kind), Access())
        stored, loaded = shadow.storer[at], shadow.loader[at]
        stored_elsewhere = (stored != 0) & (stored != me)
        loaded_elsewhere = ((loaded != 0) & (loaded != me)) | shadow.many_loaders[at]
        if kind == "store":
            launch.races += int((stored_elsewhere | loaded_elsewhere).sum())
            access.shared += int((stored != me).sum())
            access.compulsory += int((stored == 0).sum())
            shadow.storer[at], shadow.stored_at[at] = me, self.barriers
            return
        launch.races += int(stored_elsewhere.sum())
        launch.unfenced += int(((stored == me) & (shadow.stored_at[at] == self.barriers)).sum())
        first_here = loaded != me
        access.reread += int((first_here & (stored != 0)).sum())
        access.shared += int((first_here & (stored == 0)).sum())
        access.compulsory += int(((loaded == 0) & (stored == 0)).sum())
        shadow.many_loaders[at] |= loaded_elsewhere
        shadow.loader[at] = me


def _shadows(arguments: Sequence[tuple[str, Any]]) -> list[_Shadow]:
    """One for each storage among the arguments, over all that they cover of it."""
    found: dict[int, tuple[str, int, int]] = {}
    for name, tensor in arguments:
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
            continue
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        low, high = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
        key = tensor.untyped_storage().data_ptr()
        first, known_low, known_high = found.get(key, (name, low, high))
        found[key] = (first, min(low, known_low), max(high, known_high))
    return [_Shadow(*extent) for extent in found.values()]


def _route_accesses() -> None:
    """Send the interpreter's loads, stores and launches past the active meter; once."""
    if hasattr(Builder, "metered"):
        return
    Builder.metered = True
    stock_load, stock_store = Builder.create_masked_load, Builder.create_masked_store
    stock_barrier, stock_index = Builder.create_barrier, Builder.set_grid_idx
    stock_launch = interpreter.GridExecutor.__call__

    def seen(pointers: Any, mask: Any, kind: str) -> Any:
        return mask if _active is None else Handle(_active.touch(pointers, mask, kind), tl.int1)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return stock_load(self, pointers, seen(pointers, mask, "load"), *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return stock_store(self, pointers, value, seen(pointers, mask, "store"), *rest)

    def barrier(self: Any) -> Any:
        if _active is not None:
            _active.barriers += 1
        return stock_barrier(self)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if _active is not None and _active.launch is not None:
            _active.launch.programs += 1
        stock_index(self, x, y, z)

    def refuse(self: Any, *args: Any) -> Any:
        raise NotImplementedError("atomics: their order, and so the sum, differs from run to run")

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _active is None:
            return stock_launch(self, *args, **kwargs)
        name = getattr(self.fn, "__name__", "kernel")
        _active.begin(name, [*zip(self.arg_names, args, strict=False), *kwargs.items()])
        try:
            return stock_launch(self, *args, **kwargs)
        finally:
            _active.end()

    Builder.create_masked_load, Builder.create_masked_store = load, store
    Builder.create_barrier, Builder.set_grid_idx = barrier, set_grid_idx
    Builder.create_atomic_rmw = Builder.create_atomic_cas = refuse
    interpreter.GridExecutor.__call__ = launch
