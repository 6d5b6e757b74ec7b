"""Watch a model go through the passes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile._torch_private import reset_dynamo
from mhc_compile.backend import compile_frame
from mhc_compile.config import MHCConfig
from mhc_compile.convert import convert_observed, is_converted, revert_
from mhc_compile.dump import Stage
from mhc_compile.passes.annotate import annotate_values
from mhc_compile.pipeline import canonical_passes
from mhc_compile.report import Report

_AFTER = 99
_CAPTURED = frozenset({"before", *(name for name, _ in canonical_passes("auto", []))})


def trace_stages(
    model: nn.Module, *args: Any, config: MHCConfig | None = None, **kwargs: Any
) -> tuple[Report, list[Stage]]:
    """Convert ``model``, record its graphs before and after each pass, and convert it back.

    Args:
        model: any module; a converted one stays converted.
        *args: example inputs, as the model takes them.
        config: choices; the defaults if None.
        **kwargs: further example inputs.

    Returns:
        The report of the conversion, and a `Stage` for every graph and every pass that changed it.
    """
    config = config or MHCConfig()
    converted_before = is_converted(model)
    stages: list[Stage] = []

    def record(graph: int, name: str, changed: GraphModule) -> None:
        number = sum(1 for stage in stages if stage.graph == graph)
        stages.append(Stage(graph, number, name, _text(changed)))

    # The plain graphs come from the capture: those of the converted model hold markers.
    report = convert_observed(model, args, kwargs, config, record)
    compiled = 0

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal compiled
        graph, compiled = compiled, compiled + 1

        def observe(name: str, changed: GraphModule) -> None:
            if name not in _CAPTURED:
                record(graph, name, changed)

        function = compile_frame(gm, replace(config, inner="eager"), observe=observe)
        last = next(stage for stage in reversed(stages) if stage.graph == graph)
        stages.append(Stage(graph, _AFTER, "after", last.text))
        return function

    try:
        torch.compile(model, backend=backend)(*args, **kwargs)
    finally:
        reset_dynamo()
        if not converted_before:
            revert_(model)
    return report, stages


def _text(gm: GraphModule) -> str:
    annotate_values(gm)
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)
