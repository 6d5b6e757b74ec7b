"""A report of every kind of entry, made by hand."""

from dataclasses import asdict

from mhc_compile.config import MHCConfig
from mhc_compile.report import RejectedAdd, Report, Site, Trunk


def example_report() -> Report:
    """Two sites in a trunk, one left alone, and three other adds of two clauses."""

    def site(name: str, trunk: int = 0, reason: str = "") -> Site:
        owner, _, key = name.rpartition(".")
        return Site(
            name=name,
            owner=owner,
            key=key,
            form="identity",
            traits=("dropout",),
            source="model.py:12",
            shape=(2, "s0", 64),
            dtype="float32",
            trunk=trunk,
            status="left" if reason else "found",
            reason=reason,
        )

    def rejected(line: int, clause: str) -> RejectedAdd:
        return RejectedAdd(
            source=f"model.py:{line}",
            owner="h.0",
            shape=(2, 64),
            clause=clause,
            reason=f"reason of {clause}",
        )

    return Report(
        model="Toy",
        config=asdict(MHCConfig()),
        graphs=1,
        sites=(site("h.0.add0"), site("h.1.add0"), site("head.add0", -1, "its skip is a slice")),
        trunks=(
            Trunk(index=0, sites=("h.0.add0", "h.1.add0"), width=64, entry="embedding", readers=1),
        ),
        rejected=(rejected(3, "mixing"), rejected(4, "shape"), rejected(5, "mixing")),
        notes=("graph break at model.py:9",),
    )
