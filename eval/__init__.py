"""Evaluation: images in, features and statistics of them, metrics, a result that says how it was made, a report.

``evaluate`` computes any metrics of two sets of images; ``fid``, ``kid`` and the others one each. They are taken from
their modules when first asked for, so that importing this package costs no torch.
"""

# Public names and the module each lives in; resolved on first use.
_EXPORTS = {
    "evaluate": "run",
    "measure": "run",
    "read_images": "inputs",
    "to_uint8": "inputs",
    "fid": "functions",
    "fd_dinov2": "functions",
    "cmmd": "functions",
    "kid": "functions",
    "inception_score": "functions",
    "precision_recall": "functions",
    "win_rate": "preference",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(f"genkit.eval.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'genkit.eval' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
