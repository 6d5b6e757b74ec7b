"""Draw the pictures of README and docs: ``make pictures``."""

from pathlib import Path

from mhc_compile.inspection import trace_stages
from mhc_compile.pictures.svg import to_svg
from mhc_compile.targets import build_target

IMAGES = Path(__file__).parent / "images"
TARGETS = {"gpt2": ("hf:gpt2", {"n_layer": 12}), "t5": ("hf:t5", {"num_layers": 6})}


def draw(name: str) -> dict[str, str]:
    """File name -> SVG of a model of `TARGETS` before and after the rewrite."""
    target, settings = TARGETS[name]
    model, args, kwargs = build_target(target, settings)
    _, recorder = trace_stages(model, *args, **kwargs)
    return {
        f"{name}_{stage.name}.svg": to_svg(stage.view, f"{name} {stage.name} the rewrite")
        for stage in recorder.stages
        if stage.view is not None
    }


def main() -> None:
    """Write all of them."""
    IMAGES.mkdir(exist_ok=True)
    for name in TARGETS:
        for file, svg in draw(name).items():
            (IMAGES / file).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
