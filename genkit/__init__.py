"""genkit: guidance, samplers, few-step distillation and fair evaluation for diffusion and flow models.

``import genkit`` costs no torch import. It registers every component module, so that Diffusers' own loaders find
genkit's classes in saved folders; each module runs when something is first taken from it.
"""

from genkit._lazy import register_tree as _register_tree

__version__ = "0.1.0"

for _family in (
    "attention",
    "data",
    "denoisers",
    "feynman_kac",
    "guidance",
    "networks",
    "perceptual",
    "quantizers",
    "rewards",
    "schedulers",
    "testing",
    "pipelines",
    "hub",
    "interpolants",
    "latents",
    "rng",
    "sampling",
):
    _register_tree(f"genkit.{_family}")

# Public names and the module each lives in; resolved on first use.
_EXPORTS = {
    "guided": "genkit.guidance.hooks",
    "attach": "genkit.guidance.modular",
    "detach": "genkit.guidance.modular",
    "load_guider": "genkit.guidance",
    "save_portable": "genkit.hub",
    "load_flow_map": "genkit.hub",
    "sample": "genkit.sampling",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in ("training", "eval"):  # no components in them, so nobody needs them registered
        return importlib.import_module(f"genkit.{name}")
    raise AttributeError(f"module 'genkit' has no attribute {name!r}")
