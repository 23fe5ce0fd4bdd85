"""Guiders as components of Diffusers' modular pipelines: put in, saved with the folder, taken out."""

from diffusers import ModularPipeline

from genkit._diffusers import component_names, put_component, restore_component
from genkit.denoisers.network import NetworkDenoiser, from_pipeline
from genkit.guidance.base import Guider
from genkit.registry import members, unknown


def attach(pipe, guider: Guider, name: str = "guider") -> Guider:
    """Make ``guider`` the guider of a modular pipeline, so that ``save_pretrained`` keeps it.

    A copy that knows the pipeline's scheduler is put in and returned. (``pipe.update_components(guider=...)`` alone is
    neither saved nor told the scheduler.) Attach again after a change to a scheduler of another family.

    Args:
        pipe: a modular pipeline with its scheduler loaded.
        guider: the rule.
        name: of the component, ``guider_2`` in pipelines that have two.

    Raises:
        ValueError: not a modular pipeline, no such component, no scheduler, or one that does not fit the network.
    """
    _check(pipe, name)
    if not isinstance(guider, Guider):
        raise ValueError(f"guider={type(guider).__name__}: accepted is a genkit guider, see genkit.guidance")
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler yet: call pipe.load_components() before attach")
    _check_fit(pipe)
    bound = guider.bind(scheduler)
    _release(pipe, name)
    put_component(pipe, name, bound)
    return bound


def detach(pipe, name: str = "guider") -> None:
    """Give a modular pipeline back the guider that its blocks declare.

    Raises:
        ValueError: not a modular pipeline, or no such component.
    """
    _check(pipe, name)
    _release(pipe, name)
    restore_component(pipe, name)


def _release(pipe, name: str) -> None:
    """Take a guider's hook off the network, where a run that was broken off has left it."""
    guider = getattr(pipe, name, None)
    if isinstance(guider, Guider):
        guider.release()


def _check(pipe, name: str) -> None:
    if not isinstance(pipe, ModularPipeline):
        raise ValueError(
            f"pipe={type(pipe).__name__}: accepted is a modular pipeline; "
            "for a classic one use genkit.guided(pipe, guider)"
        )
    if name not in component_names(pipe):
        raise ValueError(unknown("name", name, [n for n in component_names(pipe) if "guider" in n]))


def _check_fit(pipe) -> None:
    """Refuse a scheduler whose path is not the one the network was trained on, where the network is a known one."""
    known = {
        name for adapter in members("genkit.denoisers", NetworkDenoiser).values() for name in adapter.network_classes
    }
    if any(type(part).__name__ in known for part in pipe.components.values()):
        from_pipeline(pipe)
