"""Source of genkit's own classes, packed into one file a class, for folders that load where genkit is not installed.

Diffusers takes exactly one code file a component from the Hub, so a file must bring everything that it imports.
"""

import ast
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path

import genkit

# Lines are separate strings: Diffusers scans code files for lines that begin with an import, and would tell the user to
# install whatever it finds there.
_TEMPLATE = '''"""{doc}

Made by genkit {version}. Uses genkit where it is installed; elsewhere the sources below are unpacked beside this file,
in the folder into which Diffusers copies the code of a model, and imported from there.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

SOURCES = {{
{sources}
}}


def _provide():
    spec = importlib.util.find_spec("genkit")
    if spec is not None and any(Path(folder, "_lazy.py").exists() for folder in spec.submodule_search_locations or ()):
        folder = Path(next(iter(spec.submodule_search_locations))).parent
        if folder.name != "genkit-{version}":
            return  # an installed genkit
    folder = Path(__file__).resolve().parent / "genkit-{version}"
    for name, lines in SOURCES.items():
        file = folder / name
        text = "\\n".join(lines) + "\\n"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{{os.getpid()}}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(file)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


_provide()
{body}
'''


def _file(module: str) -> Path | None:
    """The source file of a module of genkit, found without running it."""
    if module in sys.modules:
        origin = getattr(sys.modules[module].__spec__, "origin", None)
    else:
        spec = importlib.util.find_spec(module)
        origin = spec.origin if spec else None
    return Path(origin) if origin else None


def _is_package(module: str) -> bool:
    file = _file(module)
    return file is not None and file.name == "__init__.py"


def _exists(module: str) -> bool:
    try:
        return _file(module) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _genkit_imports(source: str) -> set[str]:
    """Modules of genkit that ``source`` imports, and the packages that it names in order to walk them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("genkit."):
            if node.value.replace(".", "").isidentifier() and _exists(node.value) and _is_package(node.value):
                found.update(
                    f"{node.value}.{m.name}"
                    for m in pkgutil.iter_modules([str(_file(node.value).parent)])  # type: ignore[union-attr]
                )
    return {name for name in found if name.split(".")[0] == "genkit" and _exists(name)} - {"genkit"}


def closure(classes: Iterable[type]) -> dict[str, Path]:
    """``{path: file}`` of every module of genkit that ``classes`` need, paths as seen from the folder around genkit.

    Raises:
        ValueError: a class whose source cannot be shipped.
    """
    pending = {"genkit._lazy"}
    for cls in classes:
        pending |= _genkit_imports(source_of(cls))
        if cls.__module__.startswith("genkit."):
            pending.add(cls.__module__)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        seen.add(name)
        parents = {name.rsplit(".", i)[0] for i in range(1, name.count("."))}
        needs = parents | _genkit_imports(_file(name).read_text(encoding="utf-8"))  # type: ignore[union-attr]
        pending |= needs - seen
    # The root only registers what is there; it is not searched for names.
    files = {}
    for name in sorted(seen | {"genkit"}):
        path = name.replace(".", "/") + ("/__init__.py" if _is_package(name) else ".py")
        files[path] = _file(name)
    return files  # type: ignore[return-value]


def source_of(cls: type) -> str:
    """The source of the module that defines ``cls``.

    Raises:
        ValueError: it has none on disk, or imports its neighbours in a package other than genkit.
    """
    module = sys.modules[cls.__module__]
    file = getattr(module, "__file__", None)
    if cls.__module__ == "__main__" or file is None or not Path(file).is_file():
        raise ValueError(
            f"{cls.__name__} is defined in {cls.__module__!r}, which has no file to ship; move the class into a module"
        )
    source = Path(file).read_text(encoding="utf-8")
    package = cls.__module__.split(".")[0]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level or (
            "." in cls.__module__ and package != "genkit" and (node.module or "").split(".")[0] == package
        ):
            raise ValueError(
                f"{cls.__name__} in {file} imports from its own package (line {node.lineno}); a portable folder holds "
                "one file a class, so put what the class needs into its file"
            )
    return source


def code_file(cls: type, sources: dict[str, Path]) -> str:
    """Text of the file that defines ``cls`` for a process without genkit.

    Args:
        cls: the class.
        sources: :func:`closure` of everything in the folder; the same for each of its files, so that whichever is
            loaded first provides for all.
    """
    source = source_of(cls)
    if not _genkit_imports(source):
        return source
    if cls.__module__.startswith("genkit."):
        body = f'{cls.__name__} = importlib.import_module("{cls.__module__}").{cls.__name__}'
    else:
        body = source
    packed = []
    for name, file in sources.items():
        lines = file.read_text(encoding="utf-8").splitlines()
        packed.append(f"    {name!r}: [\n" + "".join(f"        {line!r},\n" for line in lines) + "    ],")
    doc = f"{cls.__name__}, for Diffusers' ``from_pretrained(..., trust_remote_code=True)``."
    return _TEMPLATE.format(doc=doc, version=genkit.__version__, sources="\n".join(packed), body=body)
