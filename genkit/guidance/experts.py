"""Several models or conditions as one: the guider behind products of experts."""

from collections.abc import Mapping

import torch
from diffusers.configuration_utils import register_to_config

from genkit.denoisers.base import Condition, Denoiser
from genkit.guidance.base import Guided, Guider
from genkit.guidance.rows import Rows

OWN = ("cond", "uncond")


class Experts(Guider):
    """Follow the sum of the scores of several experts: other models, or other conditions of the same one.

    For the density ``prod_i q_i^{b_i}`` with clean-sample predictions ``D_i`` and ``B = sum_i b_i``::

        D = sum_i b_i D_i / B

    which is the clean sample of the score ``sum_i b_i grad log q_i`` under a scheduler of ``exponent_sum = B``. By
    itself it does not sample that density; :class:`genkit.feynman_kac.fkc.FKC` corrects it. Source: Skreta et al.,
    "Feynman-Kac correctors in diffusion", arXiv 2503.02819, section 3; exponents ``{cond: w, uncond: 1 - w}`` are CFG.

    Args:
        exponents: ``b_i`` by name, a positive sum; by default ``{"cond": 1.0}``. ``cond`` and ``uncond`` are the run's
            own model under the run's condition and without; every other name must be among the ``experts`` of
            :meth:`using`: a ``Denoiser`` (under the run's condition), a ``Condition`` (of the run's model), or a pair
            of both, on the same path.
        start, stop, enabled, scheduler_config: see :class:`Guider`. Correctors want no window: a density whose
            exponents jump has weights that no score determines.

    Raises:
        ValueError: exponents that are not finite or whose sum is not positive; before a run: an expert without exponent
            or the reverse, on another path, or a condition of another batch size.
    """

    takes = {"experts": "a mapping from names in exponents to a Denoiser, a Condition or a pair of both"}

    @register_to_config
    def __init__(
        self,
        *,
        exponents: dict[str, float] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        exponents = {"cond": 1.0} if exponents is None else dict(exponents)
        values = torch.tensor(list(exponents.values()), dtype=torch.float64)
        if not bool(values.isfinite().all()) or not values.sum() > 0:
            raise ValueError(f"exponents={exponents}: must be finite with a sum above 0 (no Gaussian is a start else)")
        super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
        self.exponents = exponents

    @property
    def needs_uncond(self) -> bool:  # type: ignore[override]
        """Whether ``uncond`` is among the experts."""
        return bool(self.exponents.get("uncond"))

    @property
    def neutral(self) -> bool:
        """Whether nothing but ``cond`` has an exponent."""
        return set(self.active_exponents) == {"cond"}

    @property
    def active_exponents(self) -> dict[str, float]:
        """The exponents that are not 0: experts with 0 are not evaluated."""
        return {name: b for name, b in self.exponents.items() if b}

    @property
    def experts(self) -> Mapping[str, tuple[Denoiser | None, Condition | None]]:
        """Model and condition of the experts that are not the run's own, ``None`` where they are."""
        found: dict[str, tuple[Denoiser | None, Condition | None]] = {}
        for name, expert in (self.given("experts") or {}).items():
            if isinstance(expert, Condition):
                found[name] = (None, expert)
            elif isinstance(expert, Denoiser):
                found[name] = (expert, None)
            else:
                found[name] = tuple(expert)
        return found

    def check(self, shape, condition=None):
        super().check(shape, condition)
        wanted = set(self.exponents) - set(OWN)
        if wanted != set(self.experts):
            raise ValueError(
                f"exponents name the experts {sorted(wanted)}, and using(experts=...) gave {sorted(self.experts)}: "
                "they must agree"
            )
        for name, (_, own) in self.experts.items():
            if own is not None and len(own) not in (0, shape[0]):
                raise ValueError(f"experts[{name!r}] has a condition for {len(own)} samples, the batch has {shape[0]}")

    def check_network(self, network, interpolant, prediction_type, shape, condition=None):
        for name, (denoiser, _) in self.experts.items():
            if denoiser is not None and not denoiser.interpolant.same_as(interpolant):
                raise ValueError(
                    f"experts[{name!r}] was made for another path ({type(denoiser.interpolant).__name__}) than the "
                    f"run's {type(interpolant).__name__}: experts must share the noise levels"
                )

    def initial(self, index):
        return Rows(index)

    def guide(self, point, state):
        rows = self.begun(point, state)
        exponents = self.active_exponents if self.active(point.t) else {"cond": 1.0}
        experts = {
            name: (denoiser, None if condition is None else condition.index(rows.index))
            for name, (denoiser, condition) in self.experts.items()
        }
        # What the run's own network is asked goes through it in one batch.
        own = {"cond": point.condition, "uncond": None}
        own |= {name: condition for name, (denoiser, condition) in experts.items() if denoiser is None}
        asked = [name for name in exponents if name in own]
        conditions = [point.condition.null() if name == "uncond" else own[name] for name in asked]
        answers = point.denoiser.many(point.z, point.t, conditions, timestep=point.timestep) if asked else []
        parts = dict(zip(asked, answers, strict=True))
        for name in exponents:
            if name not in parts:
                denoiser, condition = experts[name]
                other = point.denoiser.with_network(denoiser)
                parts[name] = other(point.z, point.t, point.condition if condition is None else condition)
        parts = {name: parts[name] for name in exponents}
        first, *others = parts
        if not others:
            return Guided(parts[first], parts), rows
        base, total = parts[first], sum(exponents.values())
        raw = base.raw.to(torch.promote_types(base.raw.dtype, torch.float32))
        update = sum(exponents[name] / total * (parts[name].as_type(base.prediction_type) - raw) for name in others)
        return Guided(base.with_raw((raw + update).to(base.raw.dtype)), parts), rows
