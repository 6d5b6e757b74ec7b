"""The Python of the README runs as it stands there."""

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.skipif(
    not entry_points(group="torch_dynamo_backends", name="mhc"),
    reason="backend='mhc' is known by name once the package is installed",
)
@pytest.mark.slow
def test_the_three_lines_convert_and_compile_and_keep_the_outputs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    setup, _, use = block.partition("report = ")
    names: dict[str, Any] = {}
    exec(setup, names)
    model, input_ids = names["model"].eval(), names["input_ids"]
    with torch.no_grad():
        expected = model(input_ids).logits
    exec(f"report = {use}", names)
    assert len(names["report"].converted) == 4
    assert_close(names["step"](input_ids).logits, expected, rtol=1e-5, atol=2e-6)
    old = {
        id(parameter) for group in names["optimizer"].param_groups for parameter in group["params"]
    }
    assert {id(parameter) for parameter in model.parameters()} == old
