"""The house's rules, read off the sources: who may import whom, what is named how, what is documented."""

import ast
import doctest
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import from those of the same or a lower number; genkit/ itself is number 0.
RANK = {"genkit": 0, "genkit.pipelines": 1, "genkit.eval": 2, "genkit.training": 3}
FOLDERS = {"genkit": "genkit", "pipelines": "genkit.pipelines", "eval": "genkit.eval", "training": "genkit.training"}
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _module(path: Path) -> str:
    first, *rest = path.with_suffix("").parts
    parts = [FOLDERS[first], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def _imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; ``from a import b`` counts as ``a.b``."""
    return _imported(path, ast.walk(_tree(path)))


def _imported(path: Path, nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the full module path"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _rank(name: str) -> int:
    return max(rank for room, rank in RANK.items() if name == room or name.startswith(room + "."))


def test_every_source_is_seen():
    assert {path.parts[0] for path in FILES} == set(FOLDERS) and len(FILES) > 50


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    # A command loads its module when it is called.
    found = _imported(path, _tree(path).body) if path.parts[:2] == ("genkit", "cli") else _imports(path)
    own = _rank(_module(path))
    upward = {name for name in found if name.split(".")[0] == "genkit" and _rank(name) > own}
    assert not upward, f"{path} imports {sorted(upward)} from a room above its own"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("genkit/registry.py", ()),
        ("genkit/rng.py", ()),
        ("genkit/_lazy.py", ("_hints",)),
        ("genkit/_diffusers.py", ()),
        ("genkit/interpolants.py", ("registry",)),
        (
            "genkit/sampling.py",
            ("denoisers", "guidance", "schedulers", "feynman_kac", "interpolants", "rng", "registry"),
        ),
    ],
)
def test_the_core_knows_nobody_above_it(path, allowed):
    known = {name.split(".")[1] for name in _imports(Path(path)) if name.startswith("genkit.")}
    assert known <= set(allowed)


@pytest.mark.parametrize("family", ["denoisers", "schedulers", "networks", "data"])
def test_the_library_does_not_know_the_loop(family):
    """Networks, paths and data are what the loop is made of, so none of them may lean on it or on guiders."""
    for path in FILES:
        if path.parts[:2] == ("genkit", family):
            above = {n for n in _imports(path) if n.startswith(("genkit.sampling", "genkit.guidance", "genkit.hub"))}
            assert not above, f"{path} imports {sorted(above)}"


def _private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_private_names_of_diffusers_live_in_one_file(path):
    if path == Path("genkit/_diffusers.py"):
        return
    imported = [name for name in _imports(path) if name.split(".")[0] == "diffusers"]
    assert not [name for name in imported if any(map(_private, name.split(".")))]
    classes = {name.rpartition(".")[2] for name in imported} | {"pipe", "scheduler", "pipeline"}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in classes:
            assert not _private(node.attr), (
                f"{path}:{node.lineno}: {node.value.id}.{node.attr} belongs in _diffusers.py"
            )


@pytest.mark.parametrize("path", FILES, ids=str)
def test_private_names_stay_in_their_package(path):
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("genkit"):
            own = node.module == package or node.module.rpartition(".")[0] == package
            borrowed = [alias.name for alias in node.names if _private(alias.name)]
            assert own or not borrowed, f"{path}:{node.lineno} takes {borrowed} from {node.module}"


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_no_package_exports_the_name_of_one_of_its_modules(path):
    """``import genkit.eval.fid as m`` would bind the function ``fid``, were it exported by ``genkit.eval``."""
    exported = set()
    for node in _tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            exported.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            exported |= {alias.asname or alias.name for alias in node.names}
    assert not exported & {info.name for info in pkgutil.iter_modules([str(ROOT / path.parent)])}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_is_public_is_documented(path):
    if path.name != "__init__.py" or _tree(path).body:
        assert ast.get_docstring(_tree(path)), f"{path} has no docstring"
    bare = [
        node.name
        for node in _tree(path).body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, f"{path}: no docstring on {bare}"


@cache
def modules() -> list[str]:
    """Every module of the four rooms by its import name."""
    return sorted({_module(path) for path in FILES if path.stem != "train_digits_classifier"})


def test_doctests():
    """Walked here, since ``--doctest-modules`` imports the mapped folders a second time under their bare names."""
    tried = 0
    for name in modules():
        module = importlib.import_module(name)
        getattr(module, "run", None)  # any name: registered modules execute when asked for one
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert result.failed == 0, f"{name}: see the captured output"
        tried += result.attempted
    assert tried, "no doctest was found, which looks like a mistake in the walk"
