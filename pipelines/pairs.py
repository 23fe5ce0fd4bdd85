"""What ``genkit pairs`` does: noise and where a model takes it, as data to train on."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from genkit.data.pairs import (
    FORMAT,
    MANIFEST,
    Pairs,
    check_noise,
    fingerprint,
    noise,
    read_manifest,
    sha256,
    shard_count,
    shard_items,
    shard_paths,
    shard_record,
)
from genkit.denoisers.network import unwrap
from genkit.pipelines.base import DenoiserPipeline
from genkit.pipelines.by_name import parse_guider, parse_reward, parse_scheduler, parse_settings
from genkit.pipelines.classic import decode, is_xl
from genkit.pipelines.commands import DTYPES, load_pipeline
from genkit.pipelines.numbered import asked_of, described, lines_of, num_classes, shape_of_call, steps_of_call
from genkit.registry import unknown
from genkit.rewards import Reward
from genkit.rng import ItemRNG


def make_pairs(
    pipeline: str | Path,
    output: Path,
    *,
    num: int,
    prompts: Sequence[str] = (),
    labels: Sequence[str] = (),
    inputs: Path | None = None,
    num_inference_steps: int | None = None,
    guider: str | None = None,
    scheduler: str | None = None,
    arguments: str = "",
    reward: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 512,
    store_noise: bool = False,
    x0_dtype: str = "float32",
    device: str | None = None,
    dtype: str = "float32",
    offload: bool = False,
    quiet: bool = False,
) -> Path:
    """Write ``num`` pairs ``(eps, x0)``, ``x0`` in the network's space, for the data source ``pairs``; resumes.

    ``pairs.json`` says what they are a function of, weights included. A shard is a safetensors file with ``x0``,
    ``item``, ``class_labels`` or prompts, and ``eps`` where asked for, and a JSON file written after it with its range
    of items, those that were left out because they, or their scores, were not finite, and its checksum. Pair ``i`` is a
    pure function of ``(seed, i)``: the batch size does not change it. A shard that is not whole is made again, and
    ``num`` may grow.

    Args:
        pipeline, prompts, labels, inputs, num_inference_steps, guider, scheduler, arguments, dtype, offload: as for
            :func:`genkit.pipelines.commands.sample_to_folder`. Item ``i`` is made of prompt or label ``i``, and from
            the first again after the last.
        reward: what scores every sample, see :func:`genkit.pipelines.by_name.parse_reward`; differentiable or not. It
            sees the image that the pipeline decodes, and its score is stored as ``score``, float32, for the data
            sources ``feedback`` and ``preferences``.
        store_noise: store ``eps`` as float32 instead of drawing it again from the seed.
        x0_dtype: what ``x0`` is stored as: ``float32``, ``float16`` or ``bfloat16``.

    Raises:
        ValueError: settings other than those of the pairs that are there; a reward that cannot take the samples or what
            they are made of; a scheduler that draws noise, so that pairs
            would not be coupled; a pair that comes out differently than it was stored; a shard without any finite
            sample.
        FileNotFoundError: no pipeline there, or no file of inputs.
    """
    for name, count in {"num": num, "batch_size": batch_size, "shard_size": shard_size}.items():
        if count < 1:
            raise ValueError(f"{name}={count}: must be at least 1")
    for name, value in {"dtype": dtype, "x0_dtype": x0_dtype}.items():
        if value not in DTYPES:
            raise ValueError(unknown(name, value, DTYPES))
    lines = lines_of(inputs)
    rule = None if guider is None else parse_guider(guider)
    scorer = None if reward is None else parse_reward(reward)
    extra = parse_settings("arguments", arguments)
    # In float32, as training loads it, so that the weights can be told again there.
    pipe = load_pipeline(pipeline, dtype=torch.float32)
    weights = fingerprint(unwrap(pipe.network))
    if dtype != "float32":  # anew, since converting would lose what must stay in float32
        pipe = load_pipeline(pipeline, dtype=DTYPES[dtype])
    if scheduler is not None:
        pipe.register_modules(scheduler=parse_scheduler(scheduler, pipe.scheduler))
    steps = steps_of_call(pipe, num_inference_steps, extra)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe.enable_model_cpu_offload(device=device) if offload else pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if lines:
        prompts, labels = ([*prompts, *lines], labels) if pipe.classic is not None else (prompts, [*labels, *lines])
    asked, given = asked_of(pipe, prompts, labels)
    shape = shape_of_call(pipe, rule, given, asked[0], steps, extra)
    if rule is not None:
        extra["guider"] = rule
    manifest = {
        "format": FORMAT,
        "pipeline": str(Path(pipeline).resolve()) if Path(pipeline).exists() else str(pipeline),
        "network": type(unwrap(pipe.network)).__name__,
        "weights": weights,
        "scheduler": described(pipe.scheduler),
        "num_inference_steps": steps,
        "guider": None if rule is None else described(rule),
        "arguments": {k: v for k, v in extra.items() if k != "guider"},
        "reward": None
        if reward is None or scorer is None
        else {"name": reward.partition(":")[0], **scorer.config.model_dump(mode="json")},
        "asked": {"as": given, "count": len(asked), "sha256": _sha256_of(asked)},
        "num_classes": num_classes(pipe.network) if given == "class_labels" else None,
        "shape": list(shape),
        "dtype": dtype,
        "x0_dtype": x0_dtype,
        "store_noise": store_noise,
        "seed": seed,
        "noise_check": noise(seed, [0], shape).flatten()[:8].tolist(),
        "shard_size": shard_size,
        "num": num,
    }
    sampler = _Sampler(pipe, steps, asked, given, extra, manifest)
    if scorer is not None:
        sampler.scored_by(scorer.to(device), device)
    _open(output, manifest)
    sampler.check(output)
    missing = [k for k in range(shard_count(manifest)) if shard_record(output, manifest, k) is None]
    left = sum(len(shard_items(manifest, k)) for k in missing)
    with tqdm(total=num, initial=num - left, unit="pair", disable=quiet or None) as bar:
        for number in missing:
            items = shard_items(manifest, number)
            parts, scores = [], []
            for start in range(items.start, items.stop, batch_size):
                batch = range(start, min(start + batch_size, items.stop))
                parts.append(sampler(batch))
                if scorer is not None:
                    scores.append(sampler.score(parts[-1], batch))
                bar.update(len(batch))
            score = torch.cat(scores) if scores else None
            _write_shard(output, manifest, number, torch.cat(parts), score, [asked[i % len(asked)] for i in items])
    return output


def score_summary(folder: Path) -> dict[str, float]:
    """``min``, ``25%``, ``50%``, ``75%`` and ``max`` of the scores of the pairs in ``folder``, the number ``kept``, and
    the number ``dropped`` because they, or their scores, were not finite: what a threshold is chosen by.

    Raises:
        FileNotFoundError: no pairs there.
        ValueError: pairs without scores.
    """
    pairs = Pairs(path=folder)
    scores = pairs.scores()
    if scores is None:
        raise ValueError(f"{str(folder)!r} holds pairs without scores; make them with a reward")
    values = numpy.quantile(scores.double().numpy(), [0, 0.25, 0.5, 0.75, 1]).tolist()
    counts = {"kept": len(scores), "dropped": sum(len(record["skipped"]) for record in pairs.records)}
    return dict(zip(("min", "25%", "50%", "75%", "max"), values, strict=True)) | counts


class _Sampler:
    """``x0`` of items, ``(B, *shape)`` float32 on the CPU."""

    def __init__(self, pipe: DenoiserPipeline, steps: int, asked: list, given: str | None, extra: dict, manifest: dict):
        self.pipe, self.steps, self.asked, self.given, self.extra = pipe, steps, asked, given, extra
        self.manifest = manifest
        self.reward: Reward | None = None
        self.device = "cpu"

    def scored_by(self, reward: Reward, device: str) -> None:
        """Samples are to be scored by ``reward``, on ``device``.

        Raises:
            ValueError: it reads prompts where the network takes labels or the reverse, or cannot take such images.
        """
        has = {"prompt": "prompts", "class_labels": "labels"}.get(self.given or "")
        if reward.takes not in (None, has):
            raise ValueError(
                f"reward={self.manifest['reward']['name']!r} reads {reward.takes}, and samples are made of "
                f"{has or 'nothing'}; use a reward that does not"
            )
        self.reward, self.device = reward, device
        reward.check_size(tuple(self._images(torch.zeros(1, *self.manifest["shape"])).shape[1:]))

    def __call__(self, items: range, stream: int = 0) -> Tensor:
        m = self.manifest
        what: dict[str, Any] = {"batch_size": len(items)}
        if self.given:
            what = {self.given: [self.asked[i % len(self.asked)] for i in items]}
        out = self.pipe(
            num_inference_steps=self.steps,
            latents=noise(m["seed"], items, tuple(m["shape"])),
            generator=ItemRNG(m["seed"] + stream, items).generators(),
            output_type="latent",
            **what,
            **self.extra,
        )
        return out.images.float().cpu()

    def score(self, x0: Tensor, items: range) -> Tensor:
        """How good the samples of ``items`` are, ``(B,)`` float32 on the CPU."""
        assert self.reward is not None
        asked = [self.asked[i % len(self.asked)] for i in items]
        images = self._images(x0)
        prompts = torch.tensor(asked, device=images.device) if self.given == "class_labels" else asked
        with torch.no_grad():
            return self.reward(images, None if self.reward.takes is None else prompts).float().cpu()

    @torch.no_grad()
    def _images(self, x0: Tensor) -> Tensor:
        """What the pipeline decodes of ``x0``, on [0, 1]."""
        pipe, x = self.pipe, x0.to(self.device)
        if pipe.components.get("vae") is not None:
            x = decode(pipe.vae, x, upcast=is_xl(pipe.classic))
            pipe.maybe_free_model_hooks()
        return (x / 2 + 0.5).clamp(0, 1)

    def check(self, folder: Path) -> None:
        """Make the first pair: it must not hang on any noise but its own, and be what it was if it is there already."""
        first = self(range(1))
        spread = first.std().item() if first.numel() > 1 else 1.0
        again = self(range(1), stream=1)
        if first.isfinite().all() and not torch.allclose(first, again, atol=0.01 * spread, rtol=0):
            raise ValueError(
                f"scheduler={type(self.pipe.scheduler).__name__} draws noise while sampling, so the end does not "
                "follow from the start and is no pair with it; use a deterministic one, such as DDIMScheduler"
            )
        if shard_record(folder, self.manifest, 0) is None:
            return
        stored = load_file(shard_paths(folder, 0)[0])
        if stored["item"][:1].tolist() == [0]:
            was = stored["x0"][:1].float()
            if not torch.allclose(first, was, atol=0.05 * spread, rtol=0):
                raise ValueError(
                    f"output={str(folder)!r}: pair 0 made again differs by {(first - was).abs().max():.3g} from the "
                    "stored one; the pairs were made with another machine, version or network: choose another folder"
                )


def _open(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, after a check that what is there was made with the same settings."""
    file = folder / MANIFEST
    if file.is_file():
        there = read_manifest(folder)
        plain = json.loads(json.dumps(manifest))
        differs = sorted(k for k in plain.keys() | there.keys() if plain.get(k) != there.get(k))
        fixed = [k for k in differs if k not in ("num", "noise_check")]
        if fixed:
            was = {key: there.get(key) for key in fixed}
            raise ValueError(f"output={str(folder)!r} holds pairs made with {was}; choose another folder")
        check_noise(there, folder)
        if there["num"] > manifest["num"]:
            raise ValueError(f"num={manifest['num']}: output={str(folder)!r} has {there['num']} pairs already")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output={str(folder)!r} is not empty and holds no {MANIFEST} of earlier pairs")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(file, manifest)


def _write_shard(
    folder: Path, manifest: dict[str, Any], number: int, x0: Tensor, score: Tensor | None, asked: list
) -> None:
    """The tensors first, whole or not at all, then the record that makes them count."""
    file, record = shard_paths(folder, number)
    items = shard_items(manifest, number)
    finite = x0.flatten(1).isfinite().all(1)
    if score is not None:
        finite &= score.isfinite()
    if not bool(finite.any()):
        raise ValueError(
            f"no sample of items {items.start} to {items.stop - 1} is finite with dtype={manifest['dtype']!r}; use "
            f"another dtype or scheduler{'' if score is None else ', or another reward'}"
        )
    item = torch.arange(items.start, items.stop)
    kept = item[finite]
    tensors = {"x0": x0[finite].to(DTYPES[manifest["x0_dtype"]]).contiguous(), "item": kept}
    if manifest["store_noise"]:
        tensors["eps"] = noise(manifest["seed"], kept, tuple(manifest["shape"]))
    if score is not None:
        tensors["score"] = score[finite]
    metadata = {"format": "pt"}
    words = [value for value, good in zip(asked, finite.tolist(), strict=True) if good]
    if manifest["asked"]["as"] == "class_labels":
        tensors["class_labels"] = torch.tensor(words)
    elif manifest["asked"]["as"] == "prompt":
        metadata["prompts"] = json.dumps(words)
    record.unlink(missing_ok=True)
    part = file.with_name(file.name + ".part")
    save_file(tensors, part, metadata)
    checksum, size = sha256(part), part.stat().st_size
    part.replace(file)
    entry = {"first": items.start, "stop": items.stop, "count": len(kept), "skipped": item[~finite].tolist()}
    if score is not None:
        entry["score"] = {name: getattr(tensors["score"], name)().item() for name in ("mean", "min", "max")}
    _write_json(record, entry | {"bytes": size, "sha256": checksum})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)


def _sha256_of(asked: list) -> str:
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()
