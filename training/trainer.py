"""THE training loop: every objective runs in it, on one process or many."""

import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import yaml
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor

from genkit.data.loader import batches
from genkit.denoisers.base import FlowMap
from genkit.rng import ItemRNG, hash_seed
from genkit.training import checkpoint, machine, sharding
from genkit.training.build import Run
from genkit.training.evaluation import Evaluator
from genkit.training.health import Health
from genkit.training.interrupt import Signals, Stopped
from genkit.training.logs import Metrics, check_trackers, flatten
from genkit.training.objectives.base import Batch, DivergedError, Phase
from genkit.training.roles import trained_roles
from genkit.training.samples import Sampler
from genkit.training.saving import Saving
from genkit.training.zero import Zero

logger = logging.getLogger("genkit.training")


class Trainer:
    """Trains the roles of ``run.objective``.

    A step takes ``global_batch_size`` items and goes through the objective's phases. Step ``k`` of a run is a pure
    function of the weights, the settings and ``k``: noise belongs to items, and the global random state is seeded anew
    at every step, so nothing that happens between steps changes a run and a resumed one goes on bit for bit.

    Args:
        run: the parts, from :func:`genkit.training.build.build`.
        quiet: no progress bar.

    Raises:
        ValueError: settings that do not fit each other, the machine, or what is in ``output_dir``.
        CheckpointError: the checkpoint to resume from is not there, broken, or another run's.
    """

    def __init__(self, run: Run, *, quiet: bool = False):
        self.run, self.config, self.objective = run, run.config, run.objective
        config = self.config
        check_trackers(config.report_to)
        phases = self._phases()
        # Looking for weights without gradient costs time, so only where a backward may leave some.
        unused = len({frozenset(p.trains) for p in phases}) > 1 or any(p.backwards > 1 for p in phases)
        # A flow map that is trained as a plain denoiser does not use what it makes of its second time.
        unused |= isinstance(run.student, FlowMap) and not self.objective.needs_flow_map
        self.accelerator = machine.accelerator(config, find_unused=unused)
        machine.check(self.accelerator, config, self.objective, phases)
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32  # accelerate turns it on where it compiles
        self.device = self.accelerator.device
        if run.pipe is not None:
            run.pipe.to(self.device)
        self.saving = Saving(config, self.objective, self.accelerator, run.components)
        self._prepare(phases)
        self._several = len({p.name for p in phases}) > 1
        self._toggle = any(set(p.trains) != set(self.roles) for p in phases)
        self._signals, self._stop = Signals(), 0
        self.health = Health(config.health) if config.health.enabled else None
        self.step = self.saving.load(self.roles)
        self.metrics = Metrics(self.accelerator, config.output_dir, self.step, config.max_train_steps, quiet)
        self.sampler = Sampler(run) if config.sampling.every else None
        self.evaluator = Evaluator(run) if config.evaluation.every else None
        self.x0: Tensor | None = None  # the latest data, what samples are measured against

    def _phases(self) -> list[Phase]:
        """The kinds of phases of the run, as seen in ten thousand steps at its start and as many spread over it."""
        last = self.config.max_train_steps - 1
        steps = (*range(min(last, 10_000)), *range(0, last, last // 10_000 + 1), last)
        return list(dict.fromkeys(p for k in steps for p in self.objective.phases(k)))

    def _prepare(self, phases: list[Phase]) -> None:
        """What is trained, as the machine wants it."""
        config, kind = self.config, self.accelerator.distributed_type
        self.autocast = self.accelerator.autocast
        self.zero: Zero | None = None
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            self.autocast = partial(sharding.autocast, config.mixed_precision, self.device)
            self.objective.forward = self.autocast()(self.objective.forward)  # type: ignore[method-assign]
        if kind != DistributedType.DEEPSPEED:
            self.wrapped = sharding.prepare(self.accelerator, self.objective)
            self.roles = trained_roles(self.objective, config, phases)
            return
        self.objective.to(self.device)
        self.roles = trained_roles(self.objective, config, phases)
        (role,) = self.roles.values()
        self.zero = role.zero = Zero(self.accelerator, self.objective, role.optimizer, config.max_grad_norm)
        self.wrapped = self.zero.engine

    # -- the loop ----------------------------------------------------------------------------------------------

    def train(self, after_step: Callable[[int], None] | None = None) -> None:
        """Run to ``max_train_steps``; ``after_step`` is called with the number of steps taken, after each.

        Raises:
            Stopped: SIGTERM or SIGINT came; the run was saved after the step under way.
            DivergedError: a loss was NaN or infinite, or the method saw itself diverge; nothing was saved since the
                last checkpoint.
            CheckpointError: a checkpoint could not be written.
        """
        with self._signals.listening():
            for step in self.steps():
                if after_step is not None:
                    after_step(step)

    def steps(self) -> Iterator[int]:
        """The same, a step at a time: yields the number of steps taken. Signals are left to the caller."""
        config = self.config
        if self.accelerator.is_main_process:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            (config.output_dir / "config.yaml").write_text(text, encoding="utf-8")
            checkpoint.clean(config.output_dir)
        if config.report_to:
            settings = flatten(config.model_dump(mode="json"))
            self.accelerator.init_trackers(config.tracker_project_name, config=settings)
        stream = batches(
            self.run.source,
            config.global_batch_size,
            seed=config.seed,
            start_step=self.step,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            micro_batches=config.gradient_accumulation_steps,
            num_workers=config.dataloader_num_workers,
            pin_memory=config.dataloader_num_workers > 0 and self.device.type == "cuda",
        )
        saved = self.step
        try:
            while self.step < config.max_train_steps and self.objective.done is None:
                values = self._train_step(stream)
                self.step += 1
                self.metrics.add(self.step, values)
                self._periodic()
                done = self.objective.done
                if done is not None and self.accelerator.is_main_process:
                    logger.info("step %d: training ends: %s", self.step, done)
                last = self.step == config.max_train_steps or done is not None
                if self._stop or last or self.step % config.checkpointing_steps == 0:
                    self.save()
                    saved = self.step
                if self._stop and not last:
                    raise Stopped(
                        f"{signal.Signals(self._stop).name}: stopped after step {self.step}, which is saved in "
                        f"{config.output_dir}; go on with resume=latest",
                        128 + self._stop,
                    )
                yield self.step
        except DivergedError as error:
            self._flush()
            kept = f"the last good checkpoint is checkpoint-{saved}" if saved else "there is no checkpoint yet"
            raise DivergedError(f"{error}; {kept}") from None
        finally:
            self.metrics.close()
            if config.report_to:
                self.accelerator.end_training()

    def _train_step(self, stream: Iterator[dict[str, Any]]) -> dict[str, Tensor | float]:
        # Dropout and the like draw from the global state.
        _seed(hash_seed(self.config.seed, self.step, self.accelerator.process_index), self.device)
        micro = [self.run.inputs(next(stream), self.device) for _ in range(self.config.gradient_accumulation_steps)]
        for batch in micro:
            batch.step, batch.total_steps = self.step, self.config.max_train_steps
        self.x0 = micro[0].x0
        values: dict[str, Tensor | float] = {f"lr/{role.name}": role.begin(self.step) for role in self.roles.values()}
        phases = self.objective.phases(self.step)
        for phase in phases:
            for repeat in range(phase.repeats):
                logs = self._update(phase, repeat, micro)
                # A role's gradient norm names the role already.
                named = self._several
                values |= {f"{k}/{phase.name}" if named and "/" not in k else k: v for k, v in logs.items()}
        return values

    def _update(self, phase: Phase, repeat: int, micro: list[Batch]) -> dict[str, Tensor]:
        """One optimiser update of the roles that ``phase`` trains; returns what to log."""
        if self._toggle:
            for name, role in self.roles.items():
                role.enable(name in phase.trains)
        total, logs, announced = self._backward(phase, repeat, micro)
        self._check(announced, phase)
        scaler = self.accelerator.scaler
        for role in (self.roles[name] for name in phase.trains):
            norm = role.update(self.config.max_grad_norm, scaler)
            logs[f"grad_norm/{role.name}"] = norm
        if scaler is not None:
            scaler.update()
        with torch.no_grad():
            self.objective.updated(phase)
        return {"loss": total, **logs}

    def _backward(self, phase: Phase, repeat: int, micro: list[Batch]) -> tuple[Tensor, dict[str, Tensor], "_HostCopy"]:
        """Gradients of every loss of every micro-batch; synchronised across processes by the last."""
        seed = hash_seed(self.config.seed, *phase.name.encode(), repeat)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        logs: dict[str, list[Tensor]] = {}
        for m, batch in enumerate(micro):
            rng = ItemRNG(seed, batch.index, self.device)
            for k in range(phase.backwards):
                last = m == len(micro) - 1 and k == phase.backwards - 1
                with self._summed(last):
                    try:
                        loss = self.wrapped(phase, batch, rng) if k == 0 else self.wrapped(phase)
                    except StopIteration:
                        raise self._miscounted(phase, str(k)) from None
                    total = total + loss.value.detach() / len(micro)
                    if last:  # before the backward is queued, so that reading it does not wait for that
                        announced = self._announce(total)
                    (self.accelerator if self.zero is None else self.zero).backward(loss.value / len(micro))
                for name, value in loss.logs.items():
                    logs.setdefault(name, []).append(value.detach())
            for _ in self.objective._running:
                raise self._miscounted(phase, f"more than {phase.backwards}")
        return total, {name: torch.stack(v).double().mean() for name, v in logs.items()}, announced

    def _summed(self, last: bool) -> AbstractContextManager:
        """Within, a backward sums gradients over processes if it is the ``last`` before the update."""
        if self.zero is not None:
            self.zero.engine.set_gradient_accumulation_boundary(last)
        return nullcontext() if last or self.zero is not None else self.accelerator.no_sync(self.wrapped)

    def _miscounted(self, phase: Phase, count: str) -> ValueError:
        return ValueError(
            f"objective={self.config.objective.name!r}: phase {phase.name!r} yields {count} losses for a batch, but "
            f"says backwards={phase.backwards}"
        )

    def _announce(self, total: Tensor) -> "_HostCopy":
        """The loss and whether a signal came, summed over processes, on their way to the host."""
        pair = torch.stack((total, torch.full_like(total, float(self._signals.received or 0))))
        return _HostCopy(self.accelerator.reduce(pair, "sum") if self.accelerator.num_processes > 1 else pair)

    def _check(self, announced: "_HostCopy", phase: Phase) -> None:
        """Stop before the weights are touched, on every process if on one."""
        loss, signalled = announced.read()
        if not math.isfinite(loss):
            raise DivergedError(f"step {self.step + 1}: the loss of phase {phase.name!r} is {loss}")
        if signalled:
            self._stop = self._signals.received or signal.SIGTERM

    # -- between steps -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write ``checkpoint-<step>`` and prune older ones.

        Raises:
            DivergedError: the last gradient was not finite, so the weights are not worth keeping.
            CheckpointError: the disk refused; older checkpoints are whole.
        """
        self._flush()
        self.saving.save(self.step, self.roles)

    def _periodic(self) -> None:
        if self.step % self.config.logging_steps == 0:
            self._flush()
        every = self.config.sampling.every
        if every and self.step % every == 0:
            self._sample()
        every = self.config.evaluation.every
        if every and self.step % every == 0:
            assert self.evaluator is not None and self.x0 is not None
            with self.averaged():
                self.evaluator(self.step, tuple(self.x0.shape[1:]), self.device, self.autocast, self.accelerator)

    def _flush(self) -> None:
        for line in self.metrics.flush():
            for key, value in line.items():
                name, _, role = key.partition("/")
                if name != "grad_norm":
                    continue
                if not math.isfinite(value) and self.accelerator.scaler is None:  # a scaler skips such updates
                    raise DivergedError(f"step {line['step']:g}: the gradient of role {role!r} has norm {value}")
                if self.health is not None:
                    self._warn(self.health.gradient_norm(int(line["step"]), role, value))

    def _sample(self) -> None:
        assert self.sampler is not None and self.x0 is not None
        diverged: list[str | None] = [None]
        if self.accelerator.is_main_process:
            with self.averaged(), self.autocast():
                samples = self.sampler.draw(tuple(self.x0.shape[1:]), self.device)
            measures: dict[str, float] = {}
            if self.health is not None:
                data = None if self.run.source.shape is None else self.x0
                try:
                    measures, alarms = self.health.samples(self.step, samples, data)
                    for alarm in alarms:
                        self._warn(alarm)
                except DivergedError as error:
                    diverged = [str(error)]
            self.sampler.record(samples, self.step, self.accelerator, measures)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(diverged)
        if diverged[0] is not None:
            raise DivergedError(diverged[0])

    def _warn(self, alarm: str | None) -> None:
        if alarm and self.accelerator.is_main_process:
            logger.warning(alarm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the student is in eval mode and has its averaged weights, where it has averages."""
        module = self.run.student.module
        ema = next((r.ema for r in self.roles.values() if r.module is module and r.ema is not None), None)
        training = module.training
        module.eval()
        try:
            with ema.swapped() if ema is not None else nullcontext():
                yield
        finally:
            module.train(training)


def _seed(seed: int, device: torch.device) -> None:
    """The global random state of the CPU and of ``device``.

    ``torch.manual_seed`` would also queue a call, with its stack, for every kind of GPU that is not in use.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class _HostCopy:
    """A device tensor on its way to the host; reading it waits for what was queued before it, not after."""

    def __init__(self, value: Tensor):
        self._value = value.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if value.is_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._value.tolist()
