"""What a checkpoint of a run holds, and how the run goes on from it."""

import logging
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor, nn

from genkit.training import checkpoint
from genkit.training.config import TrainConfig
from genkit.training.logs import flatten
from genkit.training.objectives.base import Objective
from genkit.training.roles import TrainedRole, own_buffers, state
from genkit.training.sharding import assign, whole
from genkit.training.sparse import check_known, known

logger = logging.getLogger("genkit.training")

# Settings that may change between a checkpoint and the run that goes on from it without changing what is computed.
_OPERATIONAL = {"output_dir", "resume", "report_to", "logging_dir", "tracker_project_name", "logging_steps", "health"}
_OPERATIONAL |= {"checkpointing_steps", "checkpoints_total_limit", "sampling", "evaluation", "dataloader_num_workers"}
_OPERATIONAL |= {"distill"}


def load_averages(module: nn.Module, path: Path, role: str, decay: float | None) -> None:
    """Put into ``module`` what the checkpoint at ``path`` holds of a role: weights, buffers, and over them the averages
    of ``decay``, where there are any.

    Raises:
        OSError, SafetensorError: a file that is missing or not whole.
        CheckpointError: a SaRA of another base model than that of ``module``, or of other places in it.
    """
    has = known(module)
    if has:
        check_known(path, checkpoint.read_manifest(path).get("sara", {}).get(role, has), has)
    values = load_file(path / f"{role}.safetensors")
    averages = path / f"{role}.ema.safetensors"
    if averages.is_file():
        prefix = f"{decay}/"
        values |= {k.removeprefix(prefix): v for k, v in load_file(averages).items() if k.startswith(prefix)}
    there: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in values.items():
        assign(there[name], value)


class Saving:
    """Checkpoints of one run: trained weights, averages, optimisers, schedules, step and settings.

    Args:
        components: what stands for the weights of each of ``model.components``.

    Raises:
        ValueError: the output folder holds checkpoints and the run was not told to go on from them.
        CheckpointError: the checkpoint to go on from is not there.
    """

    def __init__(self, config: TrainConfig, objective: Objective, accelerator: Accelerator, components: dict[str, str]):
        self.components = components
        self.config, self.objective, self.accelerator = config, objective, accelerator
        self.resumed_from: Path | None = None
        there = checkpoint.found(config.output_dir)
        if config.resume is not None:
            self.resumed_from = checkpoint.locate(config.resume, config.output_dir)
            if self.resumed_from is None:
                logger.info("resume=latest: no checkpoint in %s yet, starting anew", config.output_dir)
        elif there:
            raise ValueError(
                f"output_dir={str(config.output_dir)!r} holds checkpoints up to step {max(there)}; set "
                "resume=latest to go on from there, or another output_dir"
            )

    def _tensors(self, roles: dict[str, TrainedRole]) -> dict[str, dict[str, Tensor]]:
        files = {name: tensors for role in roles.values() for name, tensors in role.tensors().items()}
        kept = {name: state(role.module) for name, role in self.objective.roles.items() if role.kept}
        buffers = own_buffers(self.objective)
        return files | kept | ({"objective": buffers} if buffers else {})

    def save(self, step: int, roles: dict[str, TrainedRole]) -> None:
        """Write ``checkpoint-<step>`` and prune older ones; every process must call.

        Raises:
            CheckpointError: the disk refused; older checkpoints are whole.
        """
        failure: list[checkpoint.CheckpointError | None] = [None]
        main = self.accelerator.is_main_process
        together = any(role.spread for role in roles.values())
        snapshot = self._snapshot(step, roles) if main or together else None
        if main and snapshot is not None:
            try:
                checkpoint.save(self.config.output_dir, snapshot)
                checkpoint.prune(self.config.output_dir, self.config.checkpoints_total_limit, self.resumed_from)
            except checkpoint.CheckpointError as error:
                failure = [error]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]

    def _snapshot(self, step: int, roles: dict[str, TrainedRole]) -> checkpoint.Snapshot:
        scaler = self.accelerator.scaler
        optimizers = {name: role.optimizer_state() for name, role in roles.items()}
        info = {
            "optimizers": {name: type(role.optimizer).__name__ for name, role in roles.items()},
            "config": self.config.model_dump(mode="json"),
            "ema_updates": {name: role.ema.updates for name, role in roles.items() if role.ema is not None},
            "components": self.components,
            "sara": {name: role.sparse.known for name, role in roles.items() if role.sparse is not None},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return checkpoint.Snapshot(step, whole(self._tensors(roles)), optimizers, info)

    def load(self, roles: dict[str, TrainedRole]) -> int:
        """Put the roles in the state of the checkpoint to go on from; returns its step, 0 without one.

        Raises:
            CheckpointError: a file that is truncated, or of another run; a SaRA of another base model.
            ValueError: the output folder holds later checkpoints; ``model.components`` with other weights.
        """
        path = self.resumed_from
        if path is None:
            return 0
        wanted = self._tensors(roles)
        manifest = checkpoint.read_manifest(path)
        changes = self._changes(manifest.get("config", {}))
        try:
            for name, role in roles.items():
                if role.sparse is not None:
                    check_known(path, manifest.get("sara", {}).get(name, role.sparse.known), role.sparse.known)
            snapshot = checkpoint.load(path, wanted)
        except checkpoint.CheckpointError as error:
            raise type(error)(f"{error}; settings that differ: {changes}" if changes else str(error)) from None
        later = [s for s in checkpoint.found(self.config.output_dir) if s > snapshot.step]
        if later:
            raise ValueError(
                f"resume={self.config.resume!r} is at step {snapshot.step}, but output_dir holds later checkpoints "
                f"(steps {later}); delete them or set another output_dir"
            )
        had = snapshot.info.get("components", {})
        for name, has in self.components.items():
            if had.get(name, has) != has:
                raise ValueError(
                    f"model.components.{name}={self.config.model.components[name]!r} has the weights {has}, and {path} "
                    f"was trained with {had[name]}; give the former ones, or set another output_dir to start anew"
                )
        if changes and self.accelerator.is_main_process:
            logger.warning(
                "settings differ from those of %s, so the run will not go on as it would have: %s", path, changes
            )
        for name, tensors in wanted.items():
            for key, tensor in tensors.items():
                assign(tensor, snapshot.tensors[name][key])
        for name, role in roles.items():
            kept, wants = snapshot.info["optimizers"].get(name), type(role.optimizer).__name__
            if kept != wants:
                raise checkpoint.CheckpointError(
                    f"{path / checkpoint.OPTIMIZERS} holds the state of {kept} for role {name!r}, wanted {wants}"
                )
            try:
                role.load_optimizer_state(snapshot.optimizers[name])
            except (KeyError, ValueError) as error:
                raise checkpoint.CheckpointError(
                    f"{path / checkpoint.OPTIMIZERS} does not fit role {name!r}: {error}"
                ) from None
            if role.ema is not None:
                role.ema.updates = snapshot.info["ema_updates"][name]
        if self.accelerator.scaler is not None and snapshot.info["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(snapshot.info["scaler"])
        if self.accelerator.is_main_process:
            logger.info("resumed from %s at step %d", path, snapshot.step)
        return snapshot.step

    def _changes(self, before: dict) -> str:
        """The settings that were others ``before``, of those that change what is computed."""
        old, new = flatten(before), flatten(self.config.model_dump(mode="json"))
        progressive = getattr(self.config.adapter, "progressive_ratio", None) is not None
        if self.config.lr_scheduler.startswith("constant") and not progressive:
            # where the run ends changes nothing before that
            old["max_train_steps"] = new["max_train_steps"]
        changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and k.split(".")[0] not in _OPERATIONAL]
        return ", ".join(f"{k} ({old.get(k, 'unset')} -> {new.get(k, 'unset')})" for k in changed)
