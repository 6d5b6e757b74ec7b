"""The two folders at the root install inside mhc_compile, from a checkout and from a wheel."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("mhc_compile", "passes", "kernels")


def _setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    return table


def _packages_on_disk() -> dict[str, str]:
    """Package name -> folder of every package in the three rooms, the links left aside."""
    found = {}
    for room in ROOMS:
        for folder, _, files in os.walk(ROOT / room):  # os.walk does not follow links
            if "__init__.py" in files:
                path = Path(folder).relative_to(ROOT)
                prefix = () if room == "mhc_compile" else ("mhc_compile",)
                found[".".join((*prefix, *path.parts))] = path.as_posix()
    return found


def test_packages_and_package_dir_name_every_folder_that_holds_a_package() -> None:
    table = _setuptools_table()
    assert sorted(table["packages"]) == sorted(_packages_on_disk())
    assert table["package-dir"] == _packages_on_disk()


@pytest.mark.parametrize("room", ["passes", "kernels"])
def test_each_link_resolves_to_the_folder_it_is_mapped_to(room: str) -> None:
    mapped = ROOT / _setuptools_table()["package-dir"][f"mhc_compile.{room}"]
    assert (ROOT / "mhc_compile" / room).resolve() == mapped.resolve()


def test_importing_passes_from_the_root_fails_with_the_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "passes", raising=False)
    with pytest.raises(ImportError, match=r"import it as mhc_compile\.passes"):
        importlib.import_module("passes")


def test_kernels_at_the_root_is_an_empty_namespace_for_libraries_that_probe_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    module = importlib.import_module("kernels")
    assert getattr(module, "__file__", None) is None
    with pytest.raises(AttributeError, match=r"import mhc_compile\.kernels"):
        _ = module.spec
    with pytest.raises(ImportError):
        importlib.import_module("kernels.spec")


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {_name(entry) for entry in [*project["dependencies"], *extras["dev"], *extras["test"]]}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_name(line) for line in lines if "==" in line}
    assert wanted | {"timm", "diffusers"} <= pinned


def _name(requirement: str) -> str:
    name = requirement
    for separator in "=<>;[ ":
        name = name.partition(separator)[0]
    return name.lower().replace("_", "-")


@pytest.mark.slow
def test_wheel_holds_the_three_rooms_and_runs_from_another_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, symlinks=True, ignore=ignore)
    pip = (sys.executable, "-m", "pip")
    build = ("wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mhc_compile"}
    assert "mhc_compile/py.typed" in names
    for package in _packages_on_disk():
        assert f"{package.replace('.', '/')}/__init__.py" in names

    site = tmp_path / "site"
    install = ("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    subprocess.run([*pip, *install], check=True, capture_output=True)
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "import mhc_compile.cli as c; print(c.__file__); c.main(['--help'])",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.startswith(str(site))
    assert "usage: mhc-compile" in shown
