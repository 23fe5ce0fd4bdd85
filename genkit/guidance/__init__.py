"""Guiders: a file a rule. ``guided`` puts one into a classic pipeline, ``attach`` into a modular one.

Every guider can be imported from here: ``from genkit.guidance import APG, GFCG``.
"""

from genkit.guidance.base import Guided, Guider, Point
from genkit.guidance.hooks import guided
from genkit.guidance.modular import attach, detach
from genkit.registry import member_class, members, unknown

__all__ = ["Guided", "Guider", "Point", "attach", "detach", "guided", "load_guider"]


def __getattr__(name: str):
    return member_class(__name__, Guider, name)


def load_guider(path, **kwargs) -> Guider:
    """The guider saved in ``path`` (a folder or a Hub repository), whatever its class.

    ``BaseGuidance.from_pretrained`` does not look at the class that was saved; this does.

    Args:
        path: what ``save_pretrained`` wrote, or a repository id.
        kwargs: passed on to the loader (``subfolder``, ``revision``, ``token`` ...).

    Raises:
        OSError: no ``guider_config.json`` there.
        ValueError: a guider that is not of this package.
    """
    config: dict = Guider.load_config(str(path), **kwargs)  # type: ignore[assignment]
    known = {cls.__name__: cls for cls in members("genkit.guidance", Guider).values()}
    name = config.get("_class_name")
    if name not in known:
        raise ValueError(unknown(f"_class_name in {path}", name, known))
    return known[name].from_config(config)
