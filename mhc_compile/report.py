"""What an analysis or a conversion found, as plain data."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 2

Status = Literal["found", "converted", "left"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One residual site: an add ``x + f(x)``, or a sum of several branches."""

    name: str
    """``owner.key``: "layers.3.add0"."""
    owner: str
    """Path of the module that keeps the parameters; "" is the model itself."""
    key: str
    """Name of the parameters in ``owner.mhc``: "add0"."""
    form: str
    """"identity", "parallel", "projection", ...: see docs of `mhc_compile.passes.residuals`."""
    traits: tuple[str, ...]
    """What else is special: "in place", "scaled branch", "dropout", "post-norm", ..."""
    source: str
    """``file.py:123`` of the add."""
    shape: tuple[int | str, ...]
    """Shape of the sum; a string stands for a dynamic size."""
    dtype: str
    trunk: int
    """Index in `Report.trunks`; -1 for a site that was left alone."""
    status: Status
    """"found" by `explain`, "converted", or "left" as the plain add it was."""
    reason: str = ""
    """Why it was left; empty otherwise."""
    parameters: int = 0
    """New scalar parameters of the site."""
    activation_bytes: int | None = 0
    """Extra bytes that one call writes on the example inputs, see `mhc_compile.costs`: n streams in
    place of one sum, the branch input u, the coefficients. None where a size is dynamic."""
    choice: str = ""
    """Where the rewrite had a choice (a projection skip): what it does, and why."""


@dataclass(frozen=True, slots=True)
class TrunkOperation:
    """An operation between sites, or on a skip, that runs on each of the n streams alike."""

    name: str
    """"layer_norm", "relu", "to", ..."""
    count: int
    """How many of them the trunk has."""
    extra_bytes: int | None
    """What they write beyond one stream in one call: (n - 1) times their results; 0 for views, None
    where a size is dynamic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trunk:
    """A chain of sites that share one n-stream state."""

    index: int
    sites: tuple[str, ...]
    """Names in execution order; a shared site appears once a use."""
    width: int
    """C."""
    entry: str
    """What makes the value that is expanded: "embedding", "dropout", "graph input", ..."""
    readers: int
    """Values of the trunk that code outside its branches reads; each gets the collapsed value."""
    on_trunk: tuple[TrunkOperation, ...] = ()
    """Operations between the sites and on their skips, which run on every stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedAdd:
    """A sum of two float tensors that is no residual site."""

    source: str
    owner: str
    shape: tuple[int | str, ...]
    clause: str
    """Which part of the definition failed: "shape", "origin", "mixing", ..."""
    reason: str
    """The same for a person."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Result of `explain` and `convert_`.

    ``sites``, ``trunks`` and ``rejected`` are in the order of the graph.
    """

    model: str
    config: dict[str, Any]
    graphs: int
    """Graphs the model was captured as; more than one means graph breaks."""
    sites: tuple[Site, ...] = ()
    trunks: tuple[Trunk, ...] = ()
    rejected: tuple[RejectedAdd, ...] = ()
    notes: tuple[str, ...] = ()
    """Anything else a person should know, such as where the graph broke."""
    schema: int = field(default=SCHEMA_VERSION)

    @property
    def converted(self) -> tuple[Site, ...]:
        """Sites that take part in an n-stream trunk (or would, in `explain`)."""
        return tuple(site for site in self.sites if site.status != "left")

    @property
    def left(self) -> tuple[Site, ...]:
        """Sites that stay plain adds, each with its reason."""
        return tuple(site for site in self.sites if site.status == "left")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return asdict(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text, keys sorted."""
        return json.dumps(self.to_dict(), indent=indent, sort_keys=True)
