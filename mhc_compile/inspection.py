"""Watch a model go through the passes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile._torch_private import passing_through, reset_dynamo
from mhc_compile.backend import compile_frame
from mhc_compile.config import MHCConfig
from mhc_compile.convert import convert_, is_converted, revert_
from mhc_compile.errors import MHCError
from mhc_compile.mlir import check_mlir
from mhc_compile.recorder import Recorder
from mhc_compile.report import Report
from mhc_compile.stages import DumpOptions


def trace_stages(
    model: nn.Module,
    *args: Any,
    config: MHCConfig | None = None,
    options: DumpOptions | None = None,
    **kwargs: Any,
) -> tuple[Report, Recorder]:
    """Convert ``model``, record its graphs before and after each pass, and convert it back.

    Args:
        model: any module; a converted one stays converted.
        *args: example inputs, as the model takes them.
        config: choices; the defaults if None.
        options: what to keep of the graphs.
        **kwargs: further example inputs.

    Returns:
        The report of the conversion, and a `Stage` for every graph and every pass that changed it.

    Raises:
        ConfigError: MLIR is wanted and cannot be made.
        UnsupportedGraphError: the model cannot be converted, or not be lowered to the MLIR dialect.
    """
    config = config or MHCConfig()
    converted_before = is_converted(model)
    options = options or DumpOptions()
    if "mlir" in options.formats:
        check_mlir(options.mlir_dialect, options.mlir_custom)
    recorder = Recorder(options)
    report = convert_(model, *args, config=config, **kwargs)

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        try:
            eager = replace(config, inner="eager")
            return compile_frame(gm, eager, frozenset({"inner"}), recorder=recorder)
        except MHCError as error:
            raise passing_through(error) from error.__cause__

    try:
        torch.compile(model, backend=backend)(*args, **kwargs)
    finally:
        reset_dynamo()
        if not converted_before:
            revert_(model)
    return report, recorder
