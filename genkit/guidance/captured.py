"""A guider inside somebody else's loop: the network calls that a Diffusers pipeline made, as a denoiser and a run."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.denoisers.network import adapter_of
from genkit.guidance.point import Guided, Point
from genkit.interpolants import Interpolant

logger = logging.getLogger(__name__)

# Keyword arguments of networks that all samples share, though their first axis may be as long as the batch.
_SHARED = {"txt_ids", "img_ids", "image_rotary_emb"}


@dataclass
class Call:
    """A network call that a pipeline made: its arguments, with the noisy input and the timestep picked out."""

    args: tuple
    kwargs: dict[str, Any]

    def __post_init__(self):
        self.input_key = next((k for k in ("hidden_states", "sample", "x") if k in self.kwargs), 0)
        self.time_key = "timestep" if "timestep" in self.kwargs else 1
        if not isinstance(self._get(self.input_key), Tensor) or self._get(self.time_key) is None:
            raise ValueError(
                "the pipeline calls its network in a way that is not known here: a noisy tensor as hidden_states, "
                "sample or first argument and a timestep as timestep or second argument are needed, got "
                f"{len(self.args)} positional arguments and {sorted(self.kwargs)}"
            )

    def _get(self, key):
        if isinstance(key, str):
            return self.kwargs[key]
        return self.args[key] if key < len(self.args) else None

    @property
    def input(self) -> Tensor:
        return self._get(self.input_key)

    def shape(self, network, batch: int | None = None) -> tuple[int, ...]:
        """The shape of the samples, of which inpainting networks see more channels than they predict."""
        shape = self.input.shape
        channels = getattr(getattr(network, "config", None), "out_channels", None) if len(shape) > 3 else None
        return (batch or shape[0], min(shape[1], channels or shape[1]), *shape[2:])

    @property
    def time(self) -> Tensor:
        return torch.as_tensor(self._get(self.time_key))

    def replaced(self, rows: Tensor, z: Tensor, time: Tensor) -> tuple[list, dict]:
        """The arguments for a batch made of this call's ``rows``, at another ``z`` and another time."""
        size = len(self.input)
        args = [_take(value, rows, size) for value in self.args]
        kwargs = {key: value if key in _SHARED else _take(value, rows, size) for key, value in self.kwargs.items()}
        x = self.input[rows].clone()
        x[_leading(z)] = z.to(x.dtype)  # inpainting networks see more than the sample
        for key, value in ((self.input_key, x), (self.time_key, time.to(x.device))):
            if isinstance(key, str):
                kwargs[key] = value
            else:
                args[key] = value
        return args, kwargs


def _leading(x: Tensor) -> tuple[slice, ...]:
    """Where ``x`` lies in a tensor that has the same axes, some of them longer."""
    return tuple(map(slice, x.shape))


def _take(value, rows: Tensor, size: int):
    """Everything in ``value`` that is batched, at ``rows``."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == size else value
    if isinstance(value, dict):
        return {k: v if k in _SHARED else _take(v, rows, size) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(v, rows, size) for v in value)
    return value


def _override(kwargs: dict[str, Any], name: str, value: Tensor) -> None:
    """Set the keyword argument ``name``, at the top or in a dictionary among the arguments."""
    for place in (kwargs, *(v for v in kwargs.values() if isinstance(v, dict))):
        if name in place:
            place[name] = value.to(place[name].dtype) if value.is_floating_point() else value
            return
    raise ValueError(
        f"condition[{name!r}]: the pipeline passes no such argument to its network; it has {sorted(kwargs)}"
    )


def first_output(output) -> Tensor:
    """The prediction in what a Diffusers network returned: a tuple, an output class or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    return output[0]


class CapturedDenoiser(Denoiser):
    """The network of a pipeline at the step that the pipeline is at, its conditions known only by row.

    What the pipeline has computed is answered from memory. Anything else (another ``z``, another time, other rows) goes
    through the network with the arguments that the pipeline passed, whatever they are: ControlNet residuals, time ids,
    image embeddings.

    Args:
        network: the module that the pipeline calls.
        interpolant, prediction_type: of its inputs and outputs.
        calls: what the pipeline called it with: one doubled batch, or a batch a branch.
        cond, uncond: raw outputs, ``(B, ...)`` each; ``uncond`` is ``None`` where that branch was not evaluated.
        rows: first row of either branch in the concatenated calls.
        timestep: the scheduler's own timestep, ``()``.
    """

    def __init__(
        self,
        network,
        interpolant: Interpolant,
        prediction_type: str,
        calls: Sequence[Call],
        cond: Tensor,
        uncond: Tensor | None,
        rows: tuple[int, int],
        timestep: Tensor,
    ):
        super().__init__(network, interpolant, prediction_type)
        self._calls = calls
        # Inpainting networks see more channels than they predict, networks that learn variances predict more.
        self.shape = tuple(map(min, cond.shape, calls[0].input.shape))
        region = tuple(map(slice, self.shape))
        batch = len(cond)
        self.cond, self.uncond = cond[region], None if uncond is None else uncond[region]
        first = rows[0] % len(calls[0].input)
        self.z = calls[0].input[first : first + batch][region]
        self.timestep = timestep.cpu()  # as in genkit.sampling: no step waits for the device to make coefficients
        self.t = interpolant.time(self.timestep)
        self._answers = [(self._values(rows[0]), self.cond)]
        if self.uncond is not None:
            self._answers.append((self._values(rows[1]), self.uncond))
        values = [value for value, _ in self._answers]
        self.condition = Condition(values[0], values[1] if len(values) > 1 else None)
        # SD3's transformer is given the scheduler's timestep, Flux's a thousandth of it.
        scale = getattr(interpolant, "num_train_timesteps", 1)
        given = float(calls[0].time.flatten()[0])
        self._arguments = getattr(adapter_of(network), "arguments", {})
        self._time_factor = min((1.0, 1 / scale), key=lambda f: abs(given - f * float(timestep)))

    def many(self, z, t, conditions, *, timestep=None) -> list[Prediction]:
        known = [raw for c in conditions if (raw := self._known(c)) is not None]
        if z is self.z and torch.equal(torch.as_tensor(t).cpu(), self.t) and len(known) == len(conditions):
            return [Prediction(raw, self.prediction_type, self.interpolant, z, self.t) for raw in known]
        return super().many(z, t, conditions, timestep=timestep)

    def _known(self, condition: Condition) -> Tensor | None:
        for values, raw in self._answers:
            if condition.values.keys() == values.keys() and all(condition[k] is v for k, v in values.items()):
                return raw
        return None

    def _values(self, first: int) -> dict[str, Tensor]:
        """What is known of a branch: its rows in the calls, and the class labels where there are any."""
        call, row = divmod(first, len(self._calls[0].input))
        values = {"row": torch.arange(first, first + len(self.cond), device=self.cond.device)}
        labels = self._calls[call].kwargs.get("class_labels")
        return values if labels is None else {**values, "class_labels": labels[row : row + len(self.cond)]}

    def _around(self, network):
        other = copy.copy(self)
        other.network = network
        other._answers = []
        return other

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        rows, size = condition["row"], len(self._calls[0].input)
        answer: Tensor | None = None
        for i, call in enumerate(self._calls):
            mine = (rows // size == i).nonzero()[:, 0]
            if not len(mine):
                continue
            given = call.time
            time = timestep[mine] * self._time_factor
            time = time.to(given.dtype) if given.is_floating_point() else time
            args, kwargs = call.replaced(rows[mine] - i * size, z[mine], time)
            for name, value in condition.values.items():
                if name != "row":
                    _override(kwargs, self._arguments.get(name, name), value[mine])
            raw = first_output(self.network(*args, **kwargs))
            raw = raw[_leading(z[mine])]
            if answer is None:
                answer = raw.new_empty(z.shape)
            answer = answer.index_copy(0, mine, raw)
        assert answer is not None
        return answer


class Run:
    """The state of a guider through one sampling run of a foreign loop, and when to forget it.

    A run ends when the loop says so (:meth:`reset`), when shape, dtype or device change, or when time goes up.

    Attributes:
        guided, point: what the guider answered last, and where it was asked.
        state: its state after that.
    """

    def __init__(self, guider):
        self.guider = guider
        self.reset()

    def stats(self) -> dict[str, Tensor]:
        """See :meth:`genkit.guidance.base.Guider.stats`."""
        return self.guider.stats()

    def reset(self) -> None:
        self.guider.start_run()
        self.state: Any = None
        self.guided: Guided | None = None
        self.point: Point | None = None
        self._place: tuple | None = None
        self._t = float("inf")

    def evaluate(self, denoiser: CapturedDenoiser, t_next: Tensor | None = None) -> Guided:
        z, t = denoiser.z, float(denoiser.t)
        place = (z.shape, z.dtype, z.device)
        if place != self._place or t > self._t:
            self.reset()
            if denoiser.uncond is not None and torch.equal(denoiser.cond, denoiser.uncond):
                logger.warning(
                    "conditional and unconditional predictions are equal bit for bit, so guidance changes nothing; "
                    "pass negative_prompt='' if the pipeline makes no unconditional embeddings without it (modular SD3)"
                )
        self._place, self._t = place, t
        point = Point(denoiser, z, denoiser.t, t_next, denoiser.timestep, denoiser.condition)
        made = sum(raw is not None for raw in (denoiser.cond, denoiser.uncond))
        guided, self.state = self.guider.evaluate(point, self.state, made=made)
        self.guided, self.point = guided, point
        return guided
