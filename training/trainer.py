"""THE training loop: every objective runs in it, on one process or many."""

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import Tensor

from genkit.data.loader import batches
from genkit.rng import ItemRNG, hash_seed
from genkit.training import checkpoint
from genkit.training.build import Run
from genkit.training.health import Health
from genkit.training.logs import Metrics, check_trackers, flatten
from genkit.training.objectives.base import Batch, DivergedError, Phase
from genkit.training.roles import own_buffers, trained_roles
from genkit.training.samples import Sampler

logger = logging.getLogger("genkit.training")

# Settings that may change between a checkpoint and the run that goes on from it without changing what is computed.
_OPERATIONAL = ("output_dir", "resume", "report_to", "logging_dir", "tracker_project_name", "logging_steps")
_OPERATIONAL += ("checkpointing_steps", "checkpoints_total_limit", "sampling", "health", "dataloader_num_workers")
_MULTIPLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


class Stopped(Exception):
    """Raised, after a checkpoint, when the process was told to end; ``code`` is the exit status that says so."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Trainer:
    """Trains the roles of ``run.objective``.

    A step takes ``global_batch_size`` items and goes through the objective's phases. Step ``k`` of a run is a pure
    function of the weights, the settings and ``k``: noise belongs to items, and the global random state is seeded anew
    at every step, so nothing that happens between steps changes a run and a resumed one goes on bit for bit.

    Args:
        run: the parts, from :func:`genkit.training.build.build`.
        quiet: no progress bar.
        on_step: called with the trainer after every step on every process.

    Raises:
        ValueError: settings that do not fit each other, the machine, or what is in ``output_dir``.
    """

    def __init__(self, run: Run, *, quiet: bool = False, on_step: Callable[["Trainer"], None] | None = None):
        self.run, self.config, self.objective = run, run.config, run.objective
        self.on_step, self.step = on_step, 0
        config = self.config
        check_trackers(config.report_to)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=config.report_to or None,
            project_config=ProjectConfiguration(str(config.output_dir), str(config.output_dir / config.logging_dir)),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=self._some_unused()),
                # A weight first cast under no_grad would be cached without its gradient.
                AutocastKwargs(cache_enabled=False),
            ],
        )
        self._check_machine()
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.device = self.accelerator.device
        if run.pipe is not None:
            run.pipe.to(self.device)
        self._resumed_from = self._find_checkpoint()
        self.wrapped = self.accelerator.prepare(self.objective)
        self.roles = trained_roles(self.objective, config)
        self._toggle = any(set(p.trains) != set(self.roles) for p in self._phases())
        self.health = Health(config.health) if config.health.enabled else None
        self._norms: dict[str, Tensor] = {}
        self._signal: int | None = None
        self._stop: int | None = None
        if self._resumed_from is not None:
            self._load(self._resumed_from)
        self.metrics = Metrics(self.accelerator, config.output_dir, self.step, config.max_train_steps, quiet)
        self.sampler = Sampler(run) if config.sampling.every else None
        self.reference: Tensor | None = None

    # -- checks ------------------------------------------------------------------------------------------------

    def _phases(self) -> list[Phase]:
        """The kinds of phases of the run, as seen in its first ten thousand steps."""
        steps = range(min(self.config.max_train_steps, 10_000))
        return list(dict.fromkeys(p for k in steps for p in self.objective.phases(k)))

    def _some_unused(self) -> bool:
        """Whether a backward may leave weights without gradient; looking for them costs time, so only if so."""
        phases = self._phases()
        return len({frozenset(p.trains) for p in phases}) > 1 or any(p.backwards > 1 for p in phases)

    def _check_machine(self) -> None:
        kind = self.accelerator.distributed_type
        if kind not in _MULTIPLE:
            raise ValueError(f"distributed_type={kind.value}: accepted are {', '.join(m.value for m in _MULTIPLE)}")
        processes = self.accelerator.num_processes
        parts = processes * self.config.gradient_accumulation_steps
        if self.config.global_batch_size % parts:
            raise ValueError(
                f"global_batch_size={self.config.global_batch_size} is not a multiple of processes * "
                f"gradient_accumulation_steps = {processes} * {self.config.gradient_accumulation_steps}"
            )

    # -- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run to ``max_train_steps``.

        Raises:
            Stopped: SIGTERM or SIGINT came; the run was saved after the step under way.
            DivergedError: a loss was NaN or infinite, or the method saw itself diverge; nothing was saved since the
                last checkpoint.
            CheckpointError: a checkpoint could not be written.
        """
        config = self.config
        if self.accelerator.is_main_process:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(config.output_dir)
        settings = config.model_dump(mode="json")
        if config.report_to:
            self.accelerator.init_trackers(config.tracker_project_name, config=flatten(settings))
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
            with self._signals():
                while self.step < config.max_train_steps:
                    values = self._train_step(stream)
                    self.step += 1
                    self.metrics.add(self.step, values)
                    self._periodic()
                    stop, last = self._stop, self.step == config.max_train_steps
                    if stop or last or self.step % config.checkpointing_steps == 0:
                        self.save()
                        saved = self.step
                    if stop:
                        name = signal.Signals(stop).name
                        raise Stopped(
                            f"{name}: stopped after step {self.step}, which is saved in {config.output_dir}; "
                            "go on with resume=latest",
                            128 + stop,
                        )
        except DivergedError as error:
            self._flush()
            kept = f"the last good checkpoint is checkpoint-{saved}" if saved else "there is no checkpoint yet"
            raise DivergedError(f"{error}; {kept}") from None
        finally:
            self.metrics.close()
            if config.report_to:
                self.accelerator.end_training()

    def _train_step(self, stream: Iterator[dict[str, Any]]) -> dict[str, Tensor | float]:
        seed = hash_seed(self.config.seed, self.step, self.accelerator.process_index)
        torch.manual_seed(seed)  # of dropout and the like
        micro = [self.run.inputs(next(stream), self.device) for _ in range(self.config.gradient_accumulation_steps)]
        self.reference = micro[0].x0
        values: dict[str, Tensor | float] = {}
        phases = self.objective.phases(self.step)
        for phase in phases:
            for repeat in range(phase.repeats):
                logs = self._update(phase, repeat, micro)
                values |= {k if len(phases) == 1 else f"{k}/{phase.name}": v for k, v in logs.items()}
        for role in self.roles.values():
            values[f"lr/{role.name}"] = role.lr_scheduler.get_last_lr()[0]
            role.lr_scheduler.step()
        return values

    def _update(self, phase: Phase, repeat: int, micro: list[Batch]) -> dict[str, Tensor]:
        """One optimiser update of the roles that ``phase`` trains; returns what to log."""
        if self._toggle:
            for name, role in self.roles.items():
                role.enable(name in phase.trains)
        total, logs, announced = self._backward(phase, repeat, micro)
        self._check_finite(announced, phase)
        scaler = self.accelerator.scaler
        for role in (self.roles[name] for name in phase.trains):
            if scaler is not None:
                scaler.unscale_(role.optimizer)
            norm = role.gradient_norm(self.config.max_grad_norm)
            logs[f"grad_norm/{role.name}"] = self._norms[role.name] = norm
            role.optimizer.step() if scaler is None else scaler.step(role.optimizer)
            role.optimizer.zero_grad(set_to_none=True)
            if role.ema is not None:
                role.ema.update()
        if scaler is not None:
            scaler.update()
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
                with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                    try:
                        loss = self.wrapped(phase, batch, rng) if k == 0 else self.wrapped(phase)
                    except StopIteration:
                        raise self._miscounted(phase, str(k)) from None
                    total = total + loss.value.detach() / len(micro)
                    if last:  # before the backward is queued, so that reading it does not wait for that
                        announced = self._announce(total)
                    self.accelerator.backward(loss.value / len(micro))
                for name, value in loss.logs.items():
                    logs.setdefault(name, []).append(value.detach())
            for _ in self.objective._running:
                raise self._miscounted(phase, f"more than {phase.backwards}")
        return total, {name: torch.stack(v).double().mean() for name, v in logs.items()}, announced

    def _announce(self, total: Tensor) -> "_HostCopy":
        """The loss and whether a signal came, summed over processes, on their way to the host."""
        pair = torch.stack((total, torch.full_like(total, float(self._signal is not None))))
        return _HostCopy(self.accelerator.reduce(pair, "sum") if self.accelerator.num_processes > 1 else pair)

    def _miscounted(self, phase: Phase, count: str) -> ValueError:
        return ValueError(
            f"objective={self.config.objective.name!r}: phase {phase.name!r} yields {count} losses for a batch, but says "
            f"backwards={phase.backwards}"
        )

    def _check_finite(self, announced: "_HostCopy", phase: Phase) -> None:
        """Stop before the weights are touched, on every process if on one."""
        loss, signalled = announced.read()
        if not math.isfinite(loss):
            raise DivergedError(f"step {self.step + 1}: the loss of phase {phase.name!r} is {loss}")
        if signalled:
            self._stop = self._signal or signal.SIGTERM

    # -- between steps -----------------------------------------------------------------------------------------

    def _periodic(self) -> None:
        config = self.config
        if self.step % config.logging_steps == 0:
            self._flush()
        every = config.sampling.every
        if self.sampler is not None and every and self.step % every == 0:
            self._sample()
        if self.on_step is not None:
            self.on_step(self)

    def _flush(self) -> None:
        for line in self.metrics.flush():
            for key, value in line.items():
                name, _, role = key.partition("/")
                if self.health is not None and name == "grad_norm":
                    alarm = self.health.gradient_norm(int(line["step"]), role, value)
                    if alarm:
                        self._warn(alarm)

    def _sample(self) -> None:
        assert self.sampler is not None and self.reference is not None
        if self.accelerator.is_main_process:
            with self.averaged():
                samples = self.sampler.draw(tuple(self.reference.shape[1:]), self.device)
            measures: dict[str, float] = {}
            if self.health is not None:
                measures, alarms = self.health.samples(self.step, samples, self.reference)
                for alarm in alarms:
                    self._warn(alarm)
            self.sampler.record(samples, self.step, self.accelerator, measures)
        self.accelerator.wait_for_everyone()

    def _warn(self, text: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(text)

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

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Within, SIGTERM and SIGINT ask for a checkpoint and an end; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

        def note(number, _frame):
            self._signal = number
            for s, handler in before.items():
                signal.signal(s, handler)

        for s in before:
            signal.signal(s, note)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        files = {name: tensors for role in self.roles.values() for name, tensors in role.tensors().items()}
        buffers = own_buffers(self.objective)
        return files | ({"objective": buffers} if buffers else {})

    def save(self) -> None:
        """Write ``checkpoint-<step>`` and prune older ones.

        Raises:
            DivergedError: the last gradient was not finite, so the weights are not worth keeping.
            CheckpointError: the disk refused; older checkpoints are whole.
        """
        self._flush()
        if self.accelerator.scaler is None:  # a scaler skips such updates
            for name, norm in self._norms.items():
                if not norm.isfinite():
                    raise DivergedError(f"step {self.step}: the gradient of role {name!r} has norm {norm.item()}")
        failure: list[checkpoint.CheckpointError | None] = [None]
        if self.accelerator.is_main_process:
            try:
                checkpoint.save(self.config.output_dir, self._snapshot())
                checkpoint.prune(self.config.output_dir, self.config.checkpoints_total_limit, self._resumed_from)
            except checkpoint.CheckpointError as error:
                failure = [error]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]

    def _snapshot(self) -> checkpoint.Snapshot:
        scaler = self.accelerator.scaler
        optimizers = {
            name: {
                "optimizer": role.optimizer.state_dict(),
                "lr_scheduler": {"last_epoch": role.lr_scheduler.last_epoch},
            }
            for name, role in self.roles.items()
        }
        info = {
            "config": self.config.model_dump(mode="json"),
            "ema_updates": {name: role.ema.updates for name, role in self.roles.items() if role.ema is not None},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return checkpoint.Snapshot(self.step, self._tensors(), optimizers, info)

    def _find_checkpoint(self) -> Path | None:
        config = self.config
        there = checkpoint.found(config.output_dir)
        if config.resume is None:
            if there:
                raise ValueError(
                    f"output_dir={str(config.output_dir)!r} holds checkpoints up to step {max(there)}; set resume=latest to "
                    "go on from there, or another output_dir"
                )
            return None
        path = checkpoint.locate(config.resume, config.output_dir)
        if path is None:
            logger.info("resume=latest: no checkpoint in %s yet, starting anew", config.output_dir)
        return path

    def _load(self, path: Path) -> None:
        wanted = self._tensors()
        snapshot = checkpoint.load(path, wanted)
        later = [s for s in checkpoint.found(self.config.output_dir) if s > snapshot.step]
        if later:
            raise ValueError(
                f"resume={self.config.resume!r} is at step {snapshot.step}, but output_dir holds later checkpoints "
                f"(steps {later}); delete them or set another output_dir"
            )
        self._warn_of_changes(snapshot.info.get("config", {}), path)
        with torch.no_grad():
            for name, tensors in wanted.items():
                for key, tensor in tensors.items():
                    tensor.copy_(snapshot.tensors[name][key])
        for name, role in self.roles.items():
            try:
                role.optimizer.load_state_dict(snapshot.optimizers[name]["optimizer"])
            except (KeyError, ValueError) as error:
                raise checkpoint.CheckpointError(
                    f"{path / checkpoint.OPTIMIZERS} does not fit role {name!r} with optimizer="
                    f"{self.config.optimizer.name!r}: {error}"
                ) from None
            role.resume_schedule(snapshot.optimizers[name]["lr_scheduler"]["last_epoch"])
            if role.ema is not None:
                role.ema.updates = snapshot.info["ema_updates"][name]
        if self.accelerator.scaler is not None and snapshot.info["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(snapshot.info["scaler"])
        self.step = snapshot.step
        logger.info("resumed from %s at step %d", path, self.step)

    def _warn_of_changes(self, before: dict, path: Path) -> None:
        old, new = flatten(before), flatten(self.config.model_dump(mode="json"))
        changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and k.split(".")[0] not in _OPERATIONAL]
        if changed:
            text = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in changed)
            self._warn(f"settings differ from those of {path}, so the run will not go on as it would have: {text}")


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
