"""The command ``mhc-compile``.

Exit status: 0 all is well; 1 a checked property does not hold, a model is not supported, or nothing
was found with ``--require-match``; 2 bad usage.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mhc_compile.config import MHCConfig
from mhc_compile.convert import convert_, explain, is_converted
from mhc_compile.dump import write_dump
from mhc_compile.errors import ConfigError, MHCError, MHCWarning
from mhc_compile.inspection import lowered_graphs, trace_stages
from mhc_compile.kernel_report import (
    TARGETS,
    kernel_report,
    kernel_summary,
    kernel_tables,
    write_report,
)
from mhc_compile.memory import memory_plan
from mhc_compile.pictures.build import COLLAPSE, MAX_NODES
from mhc_compile.plots import plot_stability
from mhc_compile.render import progress, show, show_error
from mhc_compile.stability import stability
from mhc_compile.stages import CUSTOM, DIALECTS, FORMATS, PHASES, DumpOptions
from mhc_compile.stream_report import stream_report
from mhc_compile.tables import (
    count,
    memory_tables,
    report_tables,
    stability_tables,
    stream_tables,
    summary_line,
    verify_tables,
)
from mhc_compile.targets import Built, build_target, parse_settings
from mhc_compile.verify import verify

_TARGET_HELP = """\
package.module:function or file.py:function (returns (model, args) or (model, args, kwargs)),
hf:MODEL_TYPE (a small transformers model), timm:NAME; random weights, nothing is downloaded"""


def _setting(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


# Flag -> field of MHCConfig. What a value may be is for MHCConfig to say.
_CONFIG_FLAGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "--streams": ("streams", int, "number of residual streams"),
    "--constraint": ("constraint", str, "manifold of H_res"),
    "--iters": ("sinkhorn_iters", int, "Sinkhorn iterations"),
    "--sinkhorn-eps": ("sinkhorn_eps", float, "added to Sinkhorn divisors"),
    "--pre-eps": ("pre_eps", float, "added to the gate of H_pre"),
    "--norm-eps": ("norm_eps", float, "inside the root of the RMS norm"),
    "--recompute": ("recompute", _setting, "auto, off, or sites per block"),
    "--stream-collapse": ("collapse", str, "how the streams become one again"),
    "--init": ("init", str, "initialisation of the new parameters"),
}

_MODEL_FLAGS = ("--recompute", "--stream-collapse", "--init")
"""Those that say nothing about the kernels of a site."""
_Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments; None takes those of the process.
    """
    options = _parser().parse_args(argv)
    warnings.simplefilter("default", MHCWarning)
    # What torch says about its own code or a model's style helps nobody who inspects a graph.
    warnings.filterwarnings("ignore", module="torch|copyreg")
    try:
        status: int = options.run(options)
    except MHCError as error:
        if options.debug:
            raise
        show_error(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    return status


def _explain(options: argparse.Namespace) -> int:
    with progress("explain") as tell:
        model, args, kwargs = _build(options, tell)
        tell("looking for residual sites")
        if options.timeline:
            report, lowered = lowered_graphs(model, *args, config=_config(options), **kwargs)
            tell("planning streams")
            streams = stream_report(report.model, lowered)
            text, tables = streams.to_json(), stream_tables(streams)
        else:
            report = explain(model, *args, config=_config(options), **kwargs)
            text, tables = report.to_json(), report_tables(report, every_add=options.all)
    if options.memory:
        plan = memory_plan(report)
        text, tables = plan.to_json(), memory_tables(plan)
    if options.json:
        print(text)
    else:
        show(summary_line(report), tables, report.notes)
    return _require_match(options, found=bool(report.converted))


def _dump(options: argparse.Namespace) -> int:
    wanted = DumpOptions(
        formats=tuple(options.format.split(",")),
        stage=options.stage,
        phases=PHASES if options.phase == "all" else (options.phase,),
        collapse=options.detail,
        fold=options.fold,
        max_nodes=options.max_nodes,
        mlir_dialect=options.mlir_dialect,
        mlir_custom=options.mlir_custom
        or ("opaque" if options.mlir_dialect == "torch" else "decompose"),
    )
    with progress("dump") as tell:
        model, args, kwargs = _build(options, tell)
        tell("rewriting")
        report, recorder = trace_stages(
            model, *args, config=_config(options), options=wanted, **kwargs
        )
        tell("writing")
        files = write_dump(options.out, recorder, report)
    if options.json:
        print(json.dumps({"files": [str(file) for file in files]}, indent=2))
    else:
        first = "index.html" if "html" in wanted.formats else "graph_0/fw/before_after.diff"
        where = f"{len(files)} files in {options.out}, to start with {first}"
        show(f"{summary_line(report)}\n{where}", (), report.notes)
    return _require_match(options, found=bool(report.converted))


def _verify(options: argparse.Namespace) -> int:
    with progress("verify") as tell:
        config = _config(options)
        report = verify(lambda: _build(options, tell), config, tell=tell)
    if options.json:
        print(report.to_json())
    else:
        outcome = "all properties hold" if report.passed else "a property does not hold"
        show(f"{report.model}: {outcome}", verify_tables(report), report.notes)
    report.raise_if_failed()
    return 0


def _stability(options: argparse.Namespace) -> int:
    with progress("stability") as tell:
        model, args, kwargs = _build(options, tell)
        if not is_converted(model):
            tell("converting")
            convert_(model, *args, config=_config(options), **kwargs)
        tell("measuring")
        report = stability(model, *args, **kwargs)
        pictures = plot_stability(report, options.plot) if options.plot is not None else []
    if options.json:
        print(report.to_json())
        return 0
    summary = f"{type(model).__name__}: {count(len(report.sites), 'site')} measured"
    if pictures:
        summary += f", {len(pictures)} pictures in {options.plot}"
    show(summary, stability_tables(report))
    return 0


def _kernels(options: argparse.Namespace) -> int:
    with progress("kernels") as tell:
        spec = _config(options).spec()
        report = kernel_report(spec, options.dtype, options.width, options.target, tell)
    files = write_report(report, options.out) if options.out else []
    if options.json:
        print(report.to_json(source=options.source))
    elif options.source:
        print(report.source, end="")
    else:
        show(kernel_summary(report), kernel_tables(report), [f"wrote {file}" for file in files])
    return 0


def _build(options: argparse.Namespace, tell: Callable[[str], None]) -> Built:
    tell(f"building {options.target}")
    return build_target(options.target, parse_settings(options.settings))


def _config(options: argparse.Namespace) -> MHCConfig:
    """The fields that were named on the command line; all others keep their default."""
    names = [field for field, _, _ in _CONFIG_FLAGS.values()]
    names += ["include", "exclude", "dynamic", "single_pass", "seam_norm"]
    values = {name: getattr(options, name, None) for name in names}
    return MHCConfig(**{name: value for name, value in values.items() if value is not None})


def _require_match(options: argparse.Namespace, *, found: bool) -> int:
    if options.require_match and not found:
        show_error(f"{options.target} has no residual site that can be converted")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mhc-compile",
        description="Manifold-constrained hyper-connections for the residual adds of any model.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    listing = _verb(verbs, "explain", _explain, "list residual sites, trunks and other adds")
    listing.add_argument("--all", action="store_true", help="list every other add, not examples")

    instead = listing.add_mutually_exclusive_group()
    instead.add_argument(
        "--memory", action="store_true", help="what each trunk keeps for the backward, instead"
    )
    instead.add_argument(
        "--timeline",
        action="store_true",
        help="what a second stream of a GPU would gain by estimate, instead",
    )

    dump = _verb(verbs, "dump", _dump, "write the graphs before and after each pass")
    dump.add_argument("--out", type=Path, default=Path("mhc_dump"), help="folder (%(default)s)")

    dump.add_argument(
        "--format",
        default="txt,html",
        help=f"comma-separated, of {', '.join(FORMATS)} (%(default)s)",
    )
    dump.add_argument("--stage", default="all", help="all, before, after or a pass (%(default)s)")
    dump.add_argument(
        "--phase",
        choices=(*PHASES, "all"),
        default="fw",
        help="Dynamo's graph, or AOTAutograd's backward or joint graph (%(default)s)",
    )
    pictures = dump.add_argument_group("pictures")
    pictures.add_argument(  # the field of MHCConfig has its name too
        "--collapse", dest="detail", choices=COLLAPSE, default="auto", help="level of detail"
    )
    pictures.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw identical layers once",
    )
    pictures.add_argument(
        "--max-nodes", type=int, default=MAX_NODES, help="collapse further beyond (%(default)s)"
    )
    mlir = dump.add_argument_group("format mlir (needs the extra: pip install mhc-compile[mlir])")
    mlir.add_argument("--mlir-dialect", choices=DIALECTS, default="torch")
    mlir.add_argument(
        "--mlir-custom",
        choices=CUSTOM,
        help="mhc ops as operators (only in the torch dialect, the default there), or written out",
    )

    for verb in (listing, dump):
        verb.add_argument(
            "--require-match", action="store_true", help="exit with 1 if no site can be converted"
        )

    gains = _verb(verbs, "stability", _stability, "measure gains of stream mixings and trunks")
    gains.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="write heat maps and depth curves as PNG and SVG (needs the extra 'plots')",
    )

    _verb(verbs, "verify", _verify, "check that conversion keeps the function and its gradients")
    _kernels_verb(verbs)
    return parser


def _kernels_verb(verbs: _Verbs) -> None:
    text = "generate the kernels of a site, and show what they take of a target"
    parser = verbs.add_parser("kernels", help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=_kernels)
    parser.add_argument("--target", default="sm_90", help=f"{', '.join(TARGETS)} (%(default)s)")
    parser.add_argument("--width", type=int, default=1280, help="channels C (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the streams (%(default)s)")
    parser.add_argument("--source", action="store_true", help="show the generated source instead")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write source and report there")
    _output_flags(parser)
    _config_flags(parser, [flag for flag in _CONFIG_FLAGS if flag not in _MODEL_FLAGS])


def _verb(
    verbs: _Verbs,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("target", metavar="TARGET", help=_TARGET_HELP)
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a size or option of the target, such as num_hidden_layers=4; repeatable",
    )
    _output_flags(parser)
    config = _config_flags(parser, _CONFIG_FLAGS)
    for field in ("include", "exclude"):
        config.add_argument(
            f"--{field}",
            action="append",
            metavar="PATTERN",
            help=f"{field} sites whose name matches this shell pattern; repeatable",
        )
    return parser


def _output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _config_flags(parser: argparse.ArgumentParser, flags: Iterable[str]) -> argparse._ArgumentGroup:
    config = parser.add_argument_group("configuration (fields of MHCConfig)")
    for flag in flags:
        field, kind, meaning = _CONFIG_FLAGS[flag]
        metavar = flag.rpartition("-")[2].upper()
        config.add_argument(flag, dest=field, type=kind, metavar=metavar, help=meaning)
    config.add_argument(
        "--static",
        dest="dynamic",
        action="store_const",
        const=False,
        help="mappings that do not depend on the token",
    )
    config.add_argument(
        "--single-pass",
        action="store_const",
        const=True,
        help="read the streams by the weights of the site before",
    )
    if "--recompute" in flags:  # it is about graphs
        config.add_argument(
            "--seam-norm",
            action="store_const",
            const=True,
            help="have seams apply the norm with which a branch starts",
        )
    return config


if __name__ == "__main__":
    sys.exit(main())
