"""Record in a training loop how the streams of a model behave: CSV, and TensorBoard's scalars."""

import csv
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mhc_compile.errors import ConfigError
from mhc_compile.rewrite import rewrite
from mhc_compile.stability import Mixing, StabilityReport, measure

METRICS = (*(f.name for f in fields(Mixing) if f.name != "matrix"), "spread")
"""Columns of the CSV after ``step``, ``kind`` and ``name``, and last parts of scalar tags."""


class ScalarWriter(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` and its like have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Keep one number."""


class StabilityLog:
    """Measures a converted model every k steps of its training.

    The model is rewritten once, in eval mode; the rewritten module reads the parameters that are
    being trained, so that a measurement is one forward pass. Random state and the model's mode stay
    as they are.

        log = StabilityLog(model, example, every=100, csv_path="gains.csv")
        for step, batch in enumerate(batches):
            ...
            optimizer.step()
            log(step)
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        every: int = 100,
        csv_path: str | Path | None = None,
        writer: ScalarWriter | None = None,
        **kwargs: Any,
    ) -> None:
        """Prepare the measurement.

        Args:
            model: converted by `mhc_compile.convert_`.
            *args: the inputs to measure on.
            every: steps between two measurements.
            csv_path: a file that gets a row for each site and trunk; replaced if it exists.
            writer: gets a scalar for each metric of each trunk and site.
            **kwargs: further inputs.

        Raises:
            ConfigError: ``every`` is less than 1.
            UnsupportedGraphError: torch.export cannot trace the model.
        """
        if every < 1:
            raise ConfigError(f"every={every} is not allowed: use a number of steps >= 1")
        self.every = every
        self.reports: list[tuple[int, StabilityReport]] = []
        """(step, report) of every measurement."""
        self._inputs = (args, kwargs)
        self._path = None if csv_path is None else Path(csv_path)
        self._writer = writer
        modes = [(module, module.training) for module in model.modules()]
        try:
            self._module = rewrite(model.eval(), *args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w", newline="") as file:
                csv.writer(file).writerow(("step", "kind", "name", *METRICS))

    def __call__(self, step: int) -> StabilityReport | None:
        """Measure if ``step`` is a multiple of ``every``; the report, or None."""
        if step % self.every:
            return None
        args, kwargs = self._inputs
        devices = {p.device for p in self._module.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            report = measure(self._module, *args, **kwargs)
        self.reports.append((step, report))
        rows = list(_rows(report))
        if self._path is not None:
            with self._path.open("a", newline="") as file:
                csv.writer(file).writerows((step, *row) for row in rows)
        if self._writer is not None:
            for kind, name, *values in rows:
                for metric, value in zip(METRICS, values, strict=True):
                    self._writer.add_scalar(f"mhc/{kind}/{name}/{metric}", value, step)
        return report


def _rows(report: StabilityReport) -> Iterator[tuple[Any, ...]]:
    for trunk in report.trunks:
        yield ("trunk", str(trunk.index), *_metrics(trunk.composite), trunk.spread)
    for site in report.sites:
        yield ("site", site.name, *_metrics(site.mixing), site.spread)


def _metrics(mixing: Mixing) -> list[float]:
    return [getattr(mixing, name) for name in METRICS[:-1]]
