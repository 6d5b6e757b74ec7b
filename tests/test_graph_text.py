"""The text of a graph."""

import torch
from torch import nn

from mhc_compile.graph_text import readable
from mhc_compile.inspection import trace_stages
from mhc_compile.stages import DumpOptions
from tests.nets import Net, example


def test_every_argument_has_one_name_in_signature_and_body() -> None:
    _, recorder = trace_stages(Net(), example(), options=DumpOptions(formats=("txt",)))
    text = recorder.graphs[0].stages[0].text
    signature = next(line for line in text.splitlines() if "def forward(" in line)
    name = "l_self_modules_stem_parameters_weight_"
    assert f"{name}: " in signature
    assert name in text.partition(signature)[2]
    assert f" = {name}\n" not in text
    assert "L_" not in text


def test_a_graph_whose_arguments_have_one_name_stays_as_torch_prints_it() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    gm = torch.fx.symbolic_trace(Plain())
    printed = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    assert readable(gm) == printed
