"""What is declared equals what is there, and a wheel is complete by itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def _folder(package: str) -> Path:
    """Where the sources of ``package`` lie, by the longest entry of ``package-dir`` that leads to it."""
    mapped = max((p for p in SETUPTOOLS["package-dir"] if (package + ".").startswith(p + ".")), key=len)
    return Path(SETUPTOOLS["package-dir"][mapped], *package.removeprefix(mapped).split("."))


def test_packages_are_the_folders():
    declared = [_folder(package) for package in SETUPTOOLS["packages"]]
    assert len(set(declared)) == len(declared)
    tops = sorted(set(SETUPTOOLS["package-dir"].values()))
    there = {file.parent.relative_to(ROOT) for top in tops for file in (ROOT / top).rglob("__init__.py")}
    assert set(declared) == there, "list a new folder in [tool.setuptools] packages"


def test_every_source_file_is_in_a_package():
    """A folder without ``__init__.py`` would be left out of wheels without a word."""
    declared = {_folder(package) for package in SETUPTOOLS["packages"]}
    for top in ("genkit", "pipelines", "eval", "training"):
        for file in (ROOT / top).rglob("*.py"):
            parent = file.parent.relative_to(ROOT)
            assert parent in declared or parent.name == "assets", f"{parent} has no __init__.py"


def test_torchvision_is_needed_by_evaluation_only():
    project = PYPROJECT["project"]
    assert not [r for r in project["dependencies"] if r.startswith("torchvision")]
    assert [r for r in project["optional-dependencies"]["eval"] if r.startswith("torchvision")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a wheel, built from a copy of the sources, was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    for name in {Path(path).parts[0] for path in SETUPTOOLS["package-dir"].values()}:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # Without ./ pip would ask the index for the name.
    for command in (
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "..", "./"],
        [*pip, "install", "--no-deps", "--no-index", "--target", os.fspath(target)],
    ):
        wheels = [os.fspath(wheel) for wheel in folder.glob("*.whl")]
        done = subprocess.run(command + wheels, cwd=source, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return target


CHILD = """
import importlib, importlib.resources, sys
from pathlib import Path

target = Path(sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    hasattr(module, "__all__")  # runs one that was only registered
# The finder of an editable installation may supply what the wheel lacks, hence the look at where all of it came from.
foreign = [
    name for name, module in sys.modules.items()
    if name.split(".")[0] == "genkit" and not Path(module.__file__).is_relative_to(target)
]
assert not foreign, foreign

from genkit.eval.extractors.base import get_extractor
from genkit.rewards import make
from genkit.training.config import load_config

assert get_extractor("digits").dim > 0
assert all(make("digits", network=name).differentiable for name in ("trained", "held_out"))
recipes = importlib.resources.files("genkit.configs") / "digits"
load_config(recipes / "flow_matching.yaml")
assert (importlib.resources.files("genkit") / "citations.bib").read_text()
assert (importlib.resources.files("genkit") / "py.typed").is_file()
print("complete")
"""


def test_a_wheel_is_complete(installed, tmp_path):
    """Every module of the wheel is imported from it in a fresh process, and finds its data files."""
    modules = []
    for file in sorted((installed / "genkit").rglob("*.py")):
        parts = file.relative_to(installed).with_suffix("").parts
        if parts[-1] != "__main__":
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert len(modules) > 60
    done = subprocess.run(
        [sys.executable, "-c", CHILD, os.fspath(installed), *modules],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.fspath(installed)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("complete")


def test_a_wheel_holds_every_data_file(installed):
    """What is tracked beside the sources is shipped: weights, templates, recipes."""
    for pattern, folder in (
        ("eval/assets/*.safetensors", "genkit/eval/assets"),
        ("eval/assets/*.json", "genkit/eval/assets"),
        ("eval/templates/*", "genkit/eval/templates"),
        ("genkit/assets/*.safetensors", "genkit/assets"),
        ("genkit/assets/*.json", "genkit/assets"),
        ("configs/**/*.yaml", "genkit/configs"),
    ):
        files = sorted(ROOT.glob(pattern))
        assert files, pattern
        for file in files:
            inner = file.relative_to(ROOT / "configs") if pattern.startswith("configs") else Path(file.name)
            assert (installed / folder / inner).read_bytes() == file.read_bytes()
    assert not (installed / "eval").exists() and not (installed / "training").exists()
