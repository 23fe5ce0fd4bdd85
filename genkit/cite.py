"""BibTeX of the papers behind a method: those whose arXiv ids its docstrings name.

``citations.bib`` has the full entries; of a paper that is not in it the id alone makes one.
"""

import pkgutil
import re
from importlib import import_module, resources
from pathlib import Path
from types import FunctionType, ModuleType

from genkit.registry import unknown

# The families whose members can be cited, and the base class of each. Names of objectives and recipes meet here.
FAMILIES = {
    "genkit.feynman_kac": "genkit.feynman_kac.base:FeynmanKac",
    "genkit.guidance": "genkit.guidance.base:Guider",
    "genkit.schedulers": "genkit.schedulers.base:PathScheduler",
    "genkit.networks": "diffusers:ModelMixin",
    "genkit.quantizers": "genkit.quantizers.base:Quantizer",
    "genkit.training.objectives": "genkit.training.objectives.base:Objective",
    "genkit.eval.extractors": "genkit.eval.extractors.base:Extractor",
    "genkit.eval.metrics": "genkit.eval.metrics.base:Metric",
    "genkit.data": "genkit.data.base:Source",
    "genkit.rewards": "genkit.rewards.base:Reward",
}
ALONE = ("genkit.eval.geneval", "genkit.eval.mmhm", "genkit.step_annealing")  # methods that are of no family


def methods() -> dict[str, list[str]]:
    """``{method: [arXiv ids]}`` for every method of the toolkit, and for other files of its folder that name a paper.

    The ids are read from the docstrings of the file and of its public classes and functions.
    """
    from genkit.registry import members

    found: dict[str, list[str]] = {}
    for package, where in FAMILIES.items():
        base, _, name = where.partition(":")
        family = members(package, getattr(import_module(base), name))
        for info in pkgutil.iter_modules(import_module(package).__path__):
            method = info.name
            if method.startswith("_"):
                continue
            ids = _ids(import_module(f"{package}.{method}"))
            if method in family or ids:
                found[method] = list(dict.fromkeys((*found.get(method, []), *ids)))
    return found | {name.rpartition(".")[2]: _ids(import_module(name)) for name in ALONE}


def _ids(module: ModuleType) -> list[str]:
    own = [
        value
        for name, value in vars(module).items()
        if isinstance(value, (type, FunctionType)) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    named = (i for documented in (module, *own) for i in re.findall(r"\b\d{4}\.\d{5}\b", documented.__doc__ or ""))
    return list(dict.fromkeys(named))


def entries() -> dict[str, str]:
    """``{arXiv id: BibTeX entry}`` of the shipped bibliography."""
    text = resources.files("genkit").joinpath("citations.bib").read_text(encoding="utf-8")
    found = (entry.strip() for entry in re.split(r"\n(?=@)", text))
    return {m.group(1): e for e in found if (m := re.search(r"eprint\s*=\s*\{([^}]+)\}", e))}


def methods_of_run(folder: Path) -> list[str]:
    """The methods that the runs and results below ``folder`` say they used.

    Raises:
        ValueError: nothing there says so.
    """
    import yaml

    used: set[str] = set()
    for config in folder.rglob("config.yaml"):
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        used |= {settings[key]["name"] for key in ("objective", "data") if isinstance(settings.get(key), dict)}
        used |= {n for n in [settings.get("model", {}).get("network")] if n}
        used |= _quantizers(settings.get("model", {}).get("quantizer"))
        for key in ("rewards", "held_out"):
            judges = (settings.get("objective") or {}).get(key) or []
            used |= {judge if isinstance(judge, str) else judge["name"] for judge in judges}
    for results in folder.rglob("results.json"):
        text = results.read_text(encoding="utf-8")
        used |= {name for name in methods() if re.search(rf'"{re.escape(name)}"', text)}
    if not used:
        raise ValueError(f"{folder}: no config.yaml or results.json of a run below it")
    return sorted(used & set(methods()))


def _quantizers(settings: object) -> set[str]:
    """Names of a quantizer and of those that it consists of."""
    if not isinstance(settings, dict):
        return set()
    return {settings["kind"], *_quantizers(settings.get("quantizer"))} if "kind" in settings else set()


def bibtex(target: str) -> str:
    """The entries behind ``target``: a method's name, or the folder of a run.

    Raises:
        ValueError: neither, with the names that are known.
    """
    known = methods()
    if Path(target).is_dir():
        names = methods_of_run(Path(target))
    elif target in known:
        names = [target]
    else:
        raise ValueError(unknown("method", target, known))
    ids = list(dict.fromkeys(i for name in names for i in known[name]))
    heading = f"% {', '.join(names)}" + ("" if ids else ": no docstring names a paper")
    full = entries()
    return "\n\n".join([heading, *(full.get(i) or _bare(i) for i in ids)]) + "\n"


def _bare(arxiv_id: str) -> str:
    fields = f"  eprint={{{arxiv_id}}}, archivePrefix={{arXiv}}, url={{https://arxiv.org/abs/{arxiv_id}}}"
    return f"@misc{{arxiv{arxiv_id},\n{fields}\n}}"
