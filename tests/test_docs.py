"""What the documents say works: their Python runs, their commands parse, the files they name exist."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/evaluation.md")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w/]+\.(?:py|yaml))\n")
_ROOMS = {"genkit": "genkit", "pipelines": "genkit.pipelines", "eval": "genkit.eval", "training": "genkit.training"}


def _blocks(document: str, *languages: str) -> list[tuple[str, str]]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [(language, code) for language, code in _FENCE.findall(text) if language in languages]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with an untrained student where the demo would leave the trained one."""
    from genkit.networks.dit import DiT
    from genkit.pipelines import ClassConditionalPipeline
    from genkit.schedulers.flow_map import FlowMapScheduler

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student = ClassConditionalPipeline(DiT(hidden_size=16, num_layers=1, num_heads=2), FlowMapScheduler())
    student.save_pretrained("outputs/demo/student/pipeline")
    return tmp_path


@pytest.fixture
def new_files(folder):
    """``put(path, code)``: a file that for this test is a member of the package it would belong to in the sources."""
    from genkit.registry import members

    added = []

    def put(path: str, code: str) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(code, encoding="utf-8")
        if target.suffix != ".py":
            return
        assert not (ROOT / path).exists(), f"{path} exists; the walk-through needs another name"
        first, *middle, _ = Path(path).parts
        package = importlib.import_module(".".join([_ROOMS[first], *middle]))
        package.__path__.append(str(target.parent))
        added.append((package, target))
        importlib.invalidate_caches()
        members.cache_clear()

    yield put
    for package, target in added:
        package.__path__.remove(str(target.parent))
        sys.modules.pop(f"{package.__name__}.{target.stem}", None)
        vars(package).pop(target.stem, None)
    members.cache_clear()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document, new_files):
    namespace = {"__name__": "document"}
    blocks = _blocks(document, "python", "yaml")
    assert document == "ARCHITECTURE.md" or blocks
    for language, code in blocks:
        path = _FILE.match(code)
        if path:
            new_files(path[1], code)
        else:
            assert language == "python", "a recipe must say which file it is"
            exec(compile(code, f"{document}: {code.splitlines()[0]}", "exec"), namespace)


def _commands() -> list[str]:
    lines = [line for doc in DOCUMENTS for _, code in _blocks(doc, "bash") for line in code.splitlines()]
    return sorted({line for line in lines if line and not line.startswith("#")})


def _parse_genkit(arguments: list[str]) -> None:
    """Raises ``UsageError`` for an option or argument that the command does not take."""
    import typer.main

    from genkit.cli import app

    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name = arguments.pop(0)
        command = command.commands[name]
    command.make_context(command.name, arguments)


def _check_recipe(path: str, overrides: list[str]) -> None:
    from genkit.training.config import load_config

    load_config(ROOT / path, overrides)


@pytest.mark.parametrize("command", _commands())
def test_commands_are_what_the_programs_take(command):
    program, *arguments = shlex.split(command)
    if program == "make":
        target = arguments[0]
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif program == "genkit":
        _parse_genkit(list(arguments))
        if arguments[0] == "train":
            _check_recipe(arguments[1], arguments[2:])
        if arguments[0] == "distill":
            from genkit.training.distill import recipes

            assert arguments[arguments.index("--method") + 1] in {r.method for r in recipes(ROOT / "configs")}
        if arguments[0] == "cite":
            from genkit.cite import bibtex

            assert "@" in bibtex(arguments[1])
    elif command.startswith("accelerate launch -m genkit.training "):
        _check_recipe(arguments[3], arguments[4:])
    else:
        pytest.fail(f"no check is written for {program!r}")


def _named_paths(document: str) -> set[str]:
    """Files and folders that a document names in backticks or links; patterns, options and outputs left out."""
    text = _FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    named = re.findall(r"`([\w./-]+)`", text) + re.findall(r"\]\(([\w./-]+)\)", text)
    return {
        name
        for name in named
        if re.fullmatch(r"\.?[\w-]+(/[\w.-]+)*/?", name)
        and ("/" in name or name.endswith((".py", ".md", ".toml", ".yaml")))
        and not name.startswith(("outputs/", ".venv"))
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    named = _named_paths(document)
    assert document != "ARCHITECTURE.md" or len(named) > 20
    assert not sorted(name for name in named if not (ROOT / name).exists())
