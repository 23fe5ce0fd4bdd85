"""What the tests over all objectives must be told of each; there is no other list.

``READY[name]`` is a list of cases, so that a method's branches can each have one.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A way to train by an objective.

    Args:
        objective: settings beside the name.
        falls: ``(key, ratio)``: in 60 steps on digits, from a teacher of 200 steps, the logged value falls below this
            ratio of its start (means of ten). Settings of a run that differ for this test stand in ``learns``.
        teacher: whether the run has one where the method could do without.
        paths: on which ``prediction types`` are compared, of ``linear`` and ``vp``; empty for a method whose loss does
            not involve the teacher's predictions.
        run: settings of the run beside the objective.
    """

    objective: dict[str, Any] = field(default_factory=dict)
    falls: tuple[str, float] = ("loss", 1.0)
    teacher: bool = False
    paths: tuple[str, ...] = ("linear", "vp")
    run: dict[str, Any] = field(default_factory=dict)
    learns: dict[str, Any] = field(default_factory=dict)


# For what has little left to learn from the weights of a teacher.
ANEW = dict(model=dict(network="dit", hidden_size=16, num_layers=1, num_heads=2))

READY: dict[str, list[Case]] = {
    "flow_matching": [Case(falls=("loss", 0.9), learns=ANEW)],
    "flow_map": [
        Case(dict(loss="lsd", diagonal_fraction=0.5), falls=("loss", 0.9), learns=ANEW),
        Case(dict(loss="psd_u"), falls=("loss", 0.9), learns=ANEW, run=dict(gradient_accumulation_steps=2)),
        Case(dict(loss="esd", guidance_scale=2.0, jvp="finite_difference"), falls=("off_diagonal", 0.9), teacher=True),
        Case(dict(loss="psd_m", diagonal_fraction=0.25), falls=("off_diagonal", 0.7), teacher=True),
    ],
    "readout": [
        Case(
            dict(kind="spatial", modules=["sample", "blocks.0.fc2"], projection_dim=48, norm_num_groups=4),
            falls=("loss", 0.7),
            paths=(),
        )
    ],
}
