"""`MHCConfig`: every choice a user has, checked when it is made."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from glob import escape
from typing import Any, Literal, Self, get_args

from mhc_compile.errors import ConfigError, KernelError
from mhc_compile.kernels.constraints import constraint_named, constraint_of
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.pipeline import OPTIONAL_PASSES
from mhc_compile.report import Site

Collapse = Literal["mean", "sum", "learned", "pre"]
Init = Literal["preserve", "paper"]
Inner = Literal["inductor", "aot_eager", "eager"]
OnEager = Literal["raise", "warn", "ignore"]
Kernels = Literal["auto", "triton", "cpp", "reference"]
OverlapMode = Literal["auto", "off"]
Filter = tuple[str, ...] | Callable[[Site], bool]
FORM = "form:"
"""What a pattern of forms and traits starts with; other patterns are of names."""
_CHOICES = {
    "collapse": Collapse,
    "init": Init,
    "inner": Inner,
    "on_eager": OnEager,
    "kernels": Kernels,
    "overlap": OverlapMode,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MHCConfig:
    """How a model is widened to n residual streams, and how the result is compiled.

    Raises:
        ConfigError: a value is not allowed; the message lists what is.

    Reference:
        arXiv 2512.24880 (the paper); arXiv 2409.19606 for ``constraint="none"``.
    """

    streams: int = 4
    """Number n of residual streams, 1 to 16. 1 leaves every residual add as it is."""
    constraint: str = "sinkhorn"
    """How H_res is constrained: "sinkhorn" (the paper), "sinkhorn_softmax" (DeepSeek-V4's form),
    "sinkhorn_exp" (an eps in the first division too),
    "identity", "none" (hyper-connections), "permutations" (mHC-lite), "kronecker" (KromHC),
    "orthogonal" (Cayley)."""
    sinkhorn_iters: int = 20
    """Column-then-row normalisations of the two Sinkhorn constraints."""
    sinkhorn_eps: float | None = None
    """Added to each Sinkhorn divisor; None takes the constraint's own (0, or 1e-6 for
    "sinkhorn_softmax")."""
    pre_eps: float | None = None
    """Added to the sigmoid of H_pre; None takes the constraint's own (0, or 1e-6 for
    "sinkhorn_softmax")."""
    norm_eps: float = 1e-6
    """Inside the root of the RMS norm of the streams, equation (15)."""
    dynamic: bool = True
    """Mappings depend on the token (phi, alpha and bias); False keeps the static bias alone."""
    single_pass: bool = False
    """Each site reads the streams by the H_pre of the site before, so that one scan of them makes
    its input and its mappings (DeepSeek-V4.1). The first site of a trunk reads the first stream."""
    collapse: Collapse | None = None
    """How the streams become one again at the end of a trunk: "mean", "sum" or "learned"; with
    ``single_pass`` "pre", by the H_pre of the last site. None takes "mean", or "pre"."""
    init: Init = "preserve"
    """"preserve" leaves the model's outputs unchanged; "paper" is the paper's appendix A.6."""
    include: Filter = ("*",)
    """Only sites that match one of these shell patterns: of names (``layers.3.add0``, as reports
    show them), or behind ``form:`` of forms and traits (``form:identity``, ``form:post-norm``). A
    function is asked about each `mhc_compile.Site` of ``explain`` that could be rewritten; what
    `convert_` then stores in the model is the names that it took, which are plain data."""
    exclude: Filter = ()
    """Of those, none that matches one of these (or of which the function says so)."""
    kernels: Kernels = "auto"
    """What computes the mhc ops: "auto" takes the generated kernels of the device wherever they can
    (C++ on a CPU, Triton on a GPU), "cpp" and "triton" refuse anything else, "reference" is plain
    torch."""
    autotune: bool = False
    """Whether the Triton kernels of a device get the fastest of a few tiles, timed on their first
    run and kept in the cache of generated code; otherwise a rule has the tiles. No GPU has run it
    yet."""
    inner: Inner = "inductor"
    """What compiles the rewritten graph."""
    recompute: int | Literal["auto", "off"] = "auto"
    """What the backward makes again instead of keeping it: "auto" keeps the state once a block of
    sites, of the length of the paper's equation (20), and every branch output; a number is the
    length of the blocks; "off" leaves it to torch. With a budget in
    ``torch._functorch.config.activation_memory_budget``, "auto" is "off"."""
    overlap: OverlapMode = "auto"
    """"auto" runs work that a collective does not need between its start and its wait, on the
    graphs of AOTAutograd; where Inductor's own overlap scheduling is switched on, that does it.
    "off" leaves the order of the program."""
    seam_norm: bool = False
    """Whether seams apply the RMSNorm or LayerNorm with which the next branch starts, where that is
    all that reads its input: `mhc_compile.passes.seam_norms`. Sites that ``recompute`` makes again
    keep norms of their own, so that training gains with ``recompute="off"`` alone."""
    side_stream: bool = False
    """Whether the work of the streams around MLPs runs on a second stream of a GPU, where the
    estimate says that it gains by it; with ``inner="inductor"`` only. No GPU has run this yet."""
    skip_passes: tuple[str, ...] = ()
    """Passes to leave out: ``join_seams_pass``, ``join_norms_pass``, ``accumulate_gradients_pass``,
    ``split_sites_pass``, ``overlap_collectives_pass``, ``assign_streams_pass``,
    ``lower_streams_pass``. The result is the same, and slower."""
    on_eager: OnEager = "raise"
    """What a converted model does when it is called without the "mhc" backend."""

    def __post_init__(self) -> None:
        """Check every field; see `ConfigError`."""
        if self.collapse is None:
            object.__setattr__(self, "collapse", "pre" if self.single_pass else "mean")
        for name, kind in _CHOICES.items():
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise ConfigError(
                    f"{name}={value!r} is not allowed: use one of {', '.join(allowed)}"
                )
        for name in ("include", "exclude", "skip_passes"):
            value = getattr(self, name)
            if callable(value) and name != "skip_passes":
                continue
            if isinstance(value, str) or not all(isinstance(p, str) for p in value):
                what = "names of passes"
                if name != "skip_passes":
                    what = "shell patterns, or a function of a site"
                raise ConfigError(f"{name}={value!r} is not allowed: give a tuple of {what}")
            object.__setattr__(self, name, tuple(value))
        if unknown := sorted(set(self.skip_passes) - set(OPTIONAL_PASSES)):
            raise ConfigError(
                f"skip_passes={self.skip_passes!r} is not allowed: there is no {unknown[0]!r}, "
                f"but {', '.join(OPTIONAL_PASSES)}"
            )
        if self.recompute not in ("auto", "off") and not (
            type(self.recompute) is int and self.recompute >= 1
        ):
            raise ConfigError(
                f"recompute={self.recompute!r} is not allowed: use 'auto', 'off' or the number of "
                "sites in a block"
            )
        for name in ("autotune", "seam_norm", "side_stream"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not allowed: use True or False"
                )
        if (self.collapse == "pre") != self.single_pass:
            raise ConfigError(
                f"collapse={self.collapse!r} is not allowed with single_pass={self.single_pass}: "
                "a single pass ends with collapse='pre', the weights of its last site, and nothing "
                "else does"
            )
        if self.collapse == "sum" and self.init == "preserve":
            raise ConfigError(
                f"collapse='sum' multiplies the trunk by {self.streams} and so cannot preserve the "
                "model's outputs: use collapse='mean', or init='paper'"
            )
        self.spec()

    @property
    def include_patterns(self) -> tuple[str, ...]:
        """`include`, which must be patterns here."""
        return _patterns(self.include)

    @property
    def exclude_patterns(self) -> tuple[str, ...]:
        """`exclude`, which must be patterns here."""
        return _patterns(self.exclude)

    @property
    def has_predicate(self) -> bool:
        """Whether a filter is a function, which only a whole model can be asked about."""
        return callable(self.include) or callable(self.exclude)

    def select(self, sites: Iterable[Site]) -> Self:
        """This configuration with the names of sites in place of functions.

        Args:
            sites: all sites of a model, as ``explain`` finds them without filters.
        """
        found = [site for site in sites if site.status != "left"]

        def names(value: Filter) -> tuple[str, ...]:
            if not callable(value):
                return value
            return tuple(dict.fromkeys(escape(site.name) for site in found if value(site)))

        return replace(self, include=names(self.include), exclude=names(self.exclude))

    def spec(self, dim: int = -1) -> SiteSpec:
        """The specification of one site whose channel axis is ``dim`` (counted from the end)."""
        try:
            constraint = constraint_named(self.constraint)
            spec = SiteSpec(
                streams=self.streams,
                constraint=self.constraint,
                iters=self.sinkhorn_iters,
                sinkhorn_eps=_or(self.sinkhorn_eps, constraint.default_eps),
                pre_eps=_or(self.pre_eps, constraint.default_eps),
                norm_eps=self.norm_eps,
                dynamic=self.dynamic,
                single_pass=self.single_pass,
                dim=dim,
                kernels=self.kernels,
                autotune=self.autotune,
            )
            constraint_of(spec)
            return spec
        except KernelError as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Self:
        """The configuration that ``torch.compile(..., options=...)`` asks for.

        Raises:
            ConfigError: an unknown option, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options or ()) - set(known))
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(unknown)}: the mhc backend knows {', '.join(known)}"
            )
        config = cls(**(options or {}))
        if config.has_predicate:
            raise ConfigError(
                "include and exclude are asked about a whole model, and the backend sees graphs: "
                "give the function to mhc_compile.convert_, and no option here"
            )
        return config


def _patterns(value: Filter) -> tuple[str, ...]:
    assert not callable(value), "convert_ puts names in place of a function first"
    return value


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
