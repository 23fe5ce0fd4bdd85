"""What the tests over all quantizers must be told of some; there is no other list.

A quantizer that is made of ``dim=6`` and ``codebook_size=32`` needs no line.
"""

from typing import Any

from genkit.quantizers import Quantizer, make, names

TABLE = dict(dim=6, codebook_size=32)

# By name: settings in place of those, each a case of its own.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "fsq": [
        dict(dim=3, levels=(8, 6, 5)),
        dict(dim=2, levels=(3, 4), estimator="dgm", sharpness=2.0),
    ],
    "fvq": [
        TABLE | dict(dim=8),
        TABLE | dict(dim=8, bridge="dit", group_size=2, start="spread"),
        TABLE | dict(dim=8, start="residual", measure="cosine", freeze=True),
        TABLE | dict(dim=8, width=12, depth=1, start="spread", estimator="rotation", group_size=1),
    ],
    "grouped": [
        dict(dim=6, groups=2, quantizer=dict(kind="vq", codebook_size=16)),
        dict(dim=6, groups=3, quantizer=dict(kind="lfq")),
        dict(dim=4, groups=2, quantizer=dict(kind="residual", depth=2, quantizer=dict(kind="simvq", codebook_size=8))),
    ],
    "ibq": [TABLE, TABLE | dict(measure="euclidean"), TABLE | dict(measure="cosine", entropy_weight=0.0)],
    "lfq": [
        dict(dim=6),
        dict(dim=6, spherical=True, batch_entropy="bits"),
        dict(dim=6, estimator="reste", entropy_weight=0.0),
    ],
    "residual": [
        dict(dim=6, depth=3, quantizer=dict(kind="vq", codebook_size=32, init="normal")),
        dict(dim=6, depth=2, shared=True, quantizer=dict(codebook_size=32, rule="ema", restart_threshold=1.0)),
        dict(dim=8, depth=2, quantizer=dict(kind="fvq", codebook_size=32, start="spread"), estimator="rotation"),
    ],
    "simvq": [TABLE, TABLE | dict(freeze=False, bias=False, estimator="rotation", entropy_weight=0.1)],
    "vq": [
        TABLE,
        TABLE | dict(init="normal", estimator="rotation"),
        TABLE | dict(measure="cosine", init="normal"),
        TABLE | dict(measure="dot", init="normal", entropy_weight=0.1, entropy_tau=1.0),
        TABLE | dict(rule="ema", kmeans_init=True),
        TABLE | dict(rule="ema", measure="cosine", restart_threshold=1.0, entropy_weight=0.1),
        TABLE | dict(restart_threshold=1.0),
    ],
}

CASES = [(name, settings) for name in names() for settings in SETTINGS.get(name, [TABLE])]
IDS = [f"{name}-{i}" for name in names() for i in range(len(SETTINGS.get(name, [TABLE])))]


def made(case: tuple[str, dict[str, Any]]) -> Quantizer:
    name, settings = case
    return make(name, **settings)
