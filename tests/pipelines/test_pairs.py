"""Pairs of a model are made, found again after a kill, read, and trained on by that model alone."""

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from genkit.cli import app
from genkit.data.pairs import Pairs, fingerprint, noise, shard_count, shard_paths
from genkit.networks.dit import DiT
from genkit.pipelines import ClassConditionalPipeline
from genkit.pipelines import pairs as module
from genkit.pipelines.pairs import make_pairs, score_summary
from genkit.rng import ItemRNG
from genkit.sampling import sample, set_timesteps
from genkit.testing import tiny
from genkit.training.build import build
from genkit.training.config import TrainConfig

SETTINGS = dict(num_inference_steps=3, shard_size=8, quiet=True)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
        for p in made.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return made.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline of digits that knows nothing."""
    path = tmp_path_factory.mktemp("model") / "pipeline"
    ClassConditionalPipeline(transformer=network(), scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(path)
    return path


def content(output):
    return {p.name: p.read_bytes() for p in sorted(output.iterdir())}


def rows(output):
    source = Pairs(path=output)
    return source, source.__getitems__(range(len(source)))


# -- what is made ----------------------------------------------------------------------------------------------------


def test_pairs_are_the_ends_of_the_flow(folder, tmp_path):
    output = make_pairs(folder, tmp_path / "pairs", num=20, **SETTINGS)
    source, batch = rows(output)
    assert len(source) == 20 and source.shape == (1, 8, 8) and source.num_classes == 10
    assert batch["class_labels"].tolist() == [i % 10 for i in range(20)]
    assert torch.equal(batch["eps"], noise(0, range(20), (1, 8, 8)))
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    denoiser = pipe.denoiser()
    set_timesteps(pipe.scheduler, 3)
    condition = pipe.encode(class_labels=batch["class_labels"])
    expected = sample(denoiser, pipe.scheduler, batch["eps"], condition)
    assert torch.allclose(batch["x0"], expected, atol=1e-5)
    manifest = json.loads((output / "pairs.json").read_text())
    assert manifest["weights"] == fingerprint(network()) and manifest["scheduler"]["name"].startswith("FlowMatch")
    records = [json.loads(shard_paths(output, k)[1].read_text()) for k in range(shard_count(manifest))]
    assert [(r["first"], r["stop"], r["count"]) for r in records] == [(0, 8, 8), (8, 16, 8), (16, 20, 4)]


def test_the_batch_size_does_not_matter(folder, tmp_path):
    one = make_pairs(folder, tmp_path / "one", num=12, batch_size=1, **SETTINGS)
    many = make_pairs(folder, tmp_path / "many", num=12, batch_size=64, **SETTINGS)
    (_, a), (_, b) = rows(one), rows(many)
    assert torch.equal(a["eps"], b["eps"]) and torch.allclose(a["x0"], b["x0"], atol=1e-5)
    other = make_pairs(folder, tmp_path / "other", num=12, seed=1, **SETTINGS)
    assert not torch.allclose(rows(other)[1]["eps"], a["eps"])


def test_guided_pairs_by_another_scheduler(folder, tmp_path):
    settings = dict(SETTINGS, guider="cfg:guidance_scale=3", scheduler="exact_denoiser", labels=["7"])
    _, guided = rows(make_pairs(folder, tmp_path / "guided", num=4, **settings))
    _, plain = rows(make_pairs(folder, tmp_path / "plain", num=4, **(settings | dict(guider=None))))
    assert guided["class_labels"].tolist() == [7] * 4
    assert torch.equal(guided["eps"], plain["eps"]) and (guided["x0"] - plain["x0"]).abs().max() > 1e-3
    manifest = json.loads((tmp_path / "guided" / "pairs.json").read_text())
    assert manifest["guider"]["guidance_scale"] == 3 and manifest["scheduler"]["name"] == "ExactDenoiserScheduler"


@pytest.mark.parametrize("dtype, atol", [("float32", 0), ("bfloat16", 2e-2)])
def test_noise_stored_or_drawn_again(dtype, atol, folder, tmp_path):
    _, drawn = rows(make_pairs(folder, tmp_path / "drawn", num=5, **SETTINGS))
    stored = make_pairs(folder, tmp_path / "stored", num=5, store_noise=True, x0_dtype=dtype, **SETTINGS)
    assert "eps" in load_file(shard_paths(stored, 0)[0]) and "eps" not in load_file(
        shard_paths(tmp_path / "drawn", 0)[0]
    )
    _, batch = rows(stored)
    assert torch.equal(batch["eps"], drawn["eps"]) and batch["x0"].dtype == torch.float32
    assert (batch["x0"] - drawn["x0"]).abs().max() <= atol * drawn["x0"].abs().max()


@pytest.mark.parametrize("name", ["sd15", "dit", "sd3"])
def test_classic_pipelines(name, tmp_path):
    """Latents in the network's space; prompts as text, labels as numbers."""
    pipe = tiny.pipeline(name)
    pipe.save_pretrained(tmp_path / "model")
    asked = dict(labels=["3"]) if name == "dit" else dict(prompts=["a cat", "a dog"])
    output = make_pairs(tmp_path / "model", tmp_path / "pairs", num=3, batch_size=2, **(SETTINGS | asked))
    source, batch = rows(output)
    assert batch["x0"].shape == (3, 4, 16, 16) and batch["x0"].isfinite().all()
    if name == "dit":
        assert batch["class_labels"].tolist() == [3, 3, 3] and source.num_classes == 1000
    else:
        assert batch["prompts"] == ["a cat", "a dog", "a cat"] and source.num_classes is None
    source.check_network(pipe.unet if name == "sd15" else pipe.transformer)


def test_not_finite_is_left_out_and_recorded(folder, tmp_path, monkeypatch):
    make = module._Sampler.__call__

    def broken(self, items, stream=0):
        x0 = make(self, items, stream)
        x0[[i in (1, 9, 10) for i in items]] = float("nan")
        return x0

    monkeypatch.setattr(module._Sampler, "__call__", broken)
    output = make_pairs(folder, tmp_path / "pairs", num=12, **SETTINGS)
    skipped = [json.loads(shard_paths(output, k)[1].read_text())["skipped"] for k in range(2)]
    assert skipped == [[1], [9, 10]]
    source, batch = rows(output)
    items = [0, *range(2, 9), 11]
    assert len(source) == 9 and batch["x0"].isfinite().all()
    assert torch.equal(batch["eps"], noise(0, items, (1, 8, 8))) and batch["class_labels"].tolist() == [
        i % 10 for i in items
    ]
    monkeypatch.setattr(
        module._Sampler, "__call__", lambda self, items, stream=0: torch.full((len(items), 1), torch.nan)
    )
    with pytest.raises(ValueError, match="no sample of items 0 to 7 is finite with dtype='float32'"):
        make_pairs(folder, tmp_path / "none", num=12, **SETTINGS)


# -- scored ----------------------------------------------------------------------------------------------------------

SCORER = """
import torch

def ink(images):
    assert images.min() >= 0 and images.max() <= 1
    return images.double().flatten(1).mean(1).numpy()

def broken(images):
    return torch.where(torch.arange(len(images)) == 1, torch.nan, images.flatten(1).mean(1))

def label(images, labels):
    return labels

def length(images, prompts):
    return [len(p) for p in prompts]
"""


@pytest.fixture
def scorer(tmp_path):
    (tmp_path / "scorer.py").write_text(SCORER)

    def reward(name, takes=None):
        takes = "" if takes is None else f",takes={takes}"
        return f"function:path={tmp_path / 'scorer.py'}:{name},differentiable=False{takes}"

    return reward


def test_samples_are_scored_as_they_are_made(folder, tmp_path, scorer):
    plain = make_pairs(folder, tmp_path / "plain", num=20, **SETTINGS)
    output = make_pairs(folder, tmp_path / "pairs", num=12, batch_size=3, reward=scorer("ink"), **SETTINGS)
    make_pairs(folder, output, num=20, batch_size=7, reward=scorer("ink"), **SETTINGS)
    source, batch = rows(output)
    ink = (batch["x0"] / 2 + 0.5).clamp(0, 1).flatten(1).mean(1)
    assert torch.allclose(batch["score"], ink, atol=1e-6) and torch.equal(batch["score"], source.scores())
    assert torch.allclose(batch["x0"], rows(plain)[1]["x0"], atol=1e-5) and "score" not in rows(plain)[1]
    assert source.groups() == [i % 10 for i in range(20)]
    manifest = json.loads((output / "pairs.json").read_text())
    assert manifest["reward"]["name"] == "function" and manifest["reward"]["path"].endswith("scorer.py:ink")
    record = json.loads(shard_paths(output, 0)[1].read_text())["score"]
    assert record["mean"] == pytest.approx(ink[:8].mean().item()) and record["max"] == pytest.approx(
        ink[:8].max().item()
    )
    with pytest.raises(ValueError, match="holds pairs made with .*'reward': .*choose another folder"):
        make_pairs(folder, output, num=20, **SETTINGS)


def test_scores_follow_what_was_asked_for(folder, tmp_path, scorer):
    output = make_pairs(folder, tmp_path / "pairs", num=9, batch_size=4, reward=scorer("label", "labels"), **SETTINGS)
    assert rows(output)[1]["score"].tolist() == [*range(9)]


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_latents_are_decoded_before_they_are_scored(name, tmp_path, scorer):
    tiny.pipeline(name).save_pretrained(tmp_path / "model")
    asked = dict(prompts=["a cat", "seven dogs"], num=3, batch_size=2)
    output = make_pairs(tmp_path / "model", tmp_path / "pairs", reward=scorer("ink"), **SETTINGS, **asked)
    _, batch = rows(output)
    pipe = tiny.pipeline(name)
    config = pipe.vae.config
    with torch.no_grad():
        z = batch["x0"] / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        expected = (pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1).flatten(1).mean(1)
    assert torch.allclose(batch["score"], expected, atol=1e-5) and batch["score"].std() > 0
    output = make_pairs(tmp_path / "model", tmp_path / "by", reward=scorer("length", "prompts"), **SETTINGS, **asked)
    assert rows(output)[1]["score"].tolist() == [5, 10, 5]


def test_a_sample_without_a_score_is_left_out(folder, tmp_path, scorer):
    output = make_pairs(folder, tmp_path / "pairs", num=8, batch_size=4, reward=scorer("broken"), **SETTINGS)
    assert json.loads(shard_paths(output, 0)[1].read_text())["skipped"] == [1, 5]
    assert len(rows(output)[0]) == 6 and rows(output)[1]["score"].isfinite().all()
    found = score_summary(output)
    assert found.pop("kept") == 6 and found.pop("dropped") == 2
    wanted = rows(output)[1]["score"].double().quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1]).double())
    assert list(found.values()) == pytest.approx(wanted.tolist()) and list(found) == ["min", "25%", "50%", "75%", "max"]
    with pytest.raises(ValueError, match="pairs without scores"):
        score_summary(make_pairs(folder, tmp_path / "plain", num=2, **SETTINGS))


def test_rewards_that_do_not_fit_are_refused(folder, tmp_path, scorer):
    settings = dict(num=4, **SETTINGS)
    for reward, text in (
        (scorer("length", "prompts"), "reward='function' reads prompts, and samples are made of labels"),
        ("functio:path=1", "reward='functio' is not known; did you mean 'function'"),
        ("function:pat=1", "reward 'function': setting='pat' is not known; did you mean 'path'"),
        ("jpeg:quality=300", "reward 'jpeg': quality: Input should be less than or equal to 100"),
    ):
        with pytest.raises(ValueError, match=text):
            make_pairs(folder, tmp_path / "none", reward=reward, **settings)
    assert not (tmp_path / "none").exists()


def test_pairs_of_verdicts_are_trained_on(folder, tmp_path, scorer):
    """From a model's own samples and a scorer without a gradient to both methods."""
    output = make_pairs(folder, tmp_path / "pairs", num=40, reward=scorer("ink"), **SETTINGS)
    median = Pairs(path=output).scores().median().item()
    samples = dict(name="pairs", path=str(output))
    for objective, data in (
        (dict(name="dro"), dict(name="feedback", samples=samples, threshold=median)),
        (dict(name="diffusion_dpo"), dict(name="preferences", samples=samples)),
    ):
        run = build(config(folder, output, tmp_path / "run", objective=objective, data=data))
        read = run.source.__getitems__(range(4)) | {"index": torch.arange(4)}
        batch = run.inputs(read, torch.device("cpu"))
        (phase,) = run.objective.phases(0)
        (loss,) = run.objective.losses(phase, batch, ItemRNG(0, range(4)))
        loss.value.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in run.student.module.parameters())


# -- going on --------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from genkit.pipelines import pairs
make = pairs._Sampler.__call__
def slow(self, items, stream=0):
    time.sleep(0.15)
    return make(self, items, stream)
pairs._Sampler.__call__ = slow
pairs.make_pairs(sys.argv[1], Path(sys.argv[2]), num=40, num_inference_steps=3, shard_size=8, batch_size=2, quiet=True)
"""


def test_a_killed_run_goes_on(folder, tmp_path):
    """Killed in the middle of a shard, it leaves whole shards; the rest is made anew, with no duplicate and no gap."""
    whole = make_pairs(folder, tmp_path / "whole", num=40, batch_size=2, **SETTINGS)
    output = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(output)])
    record = shard_paths(output, 1)[1]
    deadline = time.monotonic() + 400
    while not record.is_file() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    there = [k for k in range(5) if shard_paths(output, k)[1].is_file()]
    assert there[:2] == [0, 1] and len(there) < 5
    with pytest.raises(ValueError, match=f"lacks {5 - len(there)} of 5 shards, the first is shard-0000{len(there)}"):
        Pairs(path=output)
    kept = shard_paths(output, 0)[0].stat().st_mtime_ns
    # A file without its record counts as nothing, whatever is in it.
    shard_paths(output, len(there))[0].write_bytes(b"half")
    make_pairs(folder, output, num=40, batch_size=2, **SETTINGS)
    assert content(output) == content(whole)
    assert shard_paths(output, 0)[0].stat().st_mtime_ns == kept
    items = torch.cat([load_file(shard_paths(output, k)[0])["item"] for k in range(5)])
    assert items.tolist() == list(range(40))


def test_more_pairs_complete_the_last_shard(folder, tmp_path):
    output = make_pairs(folder, tmp_path / "pairs", num=10, **SETTINGS)
    make_pairs(folder, output, num=20, **SETTINGS)
    assert content(output) == content(make_pairs(folder, tmp_path / "whole", num=20, **SETTINGS))
    with pytest.raises(ValueError, match="num=10: output=.* has 20 pairs already"):
        make_pairs(folder, output, num=10, **SETTINGS)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(seed=3), "'seed': 0"),
        (dict(num_inference_steps=4), "'num_inference_steps': 3"),
        (dict(guider="cfg:guidance_scale=2"), "'guider': None"),
        (dict(labels=["1"]), "'asked': "),
        (dict(shard_size=4), "'shard_size': 8"),
    ],
)
def test_other_settings_are_refused(change, text, folder, tmp_path):
    output = make_pairs(folder, tmp_path / "pairs", num=4, **SETTINGS)
    before = content(output)
    with pytest.raises(ValueError, match=f"holds pairs made with .*{text}.*choose another folder"):
        make_pairs(folder, output, num=4, **(SETTINGS | change))
    assert content(output) == before


def test_a_pair_that_comes_out_differently_stops_the_run(folder, tmp_path):
    output = make_pairs(folder, tmp_path / "pairs", num=8, **SETTINGS)
    file, record = shard_paths(output, 0)
    tensors = load_file(file)
    tensors["x0"] = tensors["x0"] + 1
    save_file(tensors, file, {"format": "pt"})
    entry = json.loads(record.read_text())
    record.write_text(json.dumps(entry | {"bytes": file.stat().st_size}))
    with pytest.raises(ValueError, match="pair 0 made again differs by 1 from the stored one"):
        make_pairs(folder, output, num=20, **SETTINGS)


def test_other_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match="InterpolantScheduler draws noise while sampling"):
        make_pairs(folder, tmp_path / "sde", num=4, **SETTINGS, scheduler="interpolant")
    for name in ("num", "batch_size", "shard_size"):
        with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
            make_pairs(folder, tmp_path / "none", **(dict(num=1) | SETTINGS | {name: 0}))
    with pytest.raises(ValueError, match="x0_dtype='int8' is not known"):
        make_pairs(folder, tmp_path / "none", num=1, **SETTINGS, x0_dtype="int8")
    with pytest.raises(ValueError, match="arguments: setting='hight' is not known"):
        make_pairs(folder, tmp_path / "none", num=1, **SETTINGS, arguments="hight=3")
    assert not (tmp_path / "none").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty and holds no pairs.json"):
        make_pairs(folder, tmp_path / "full", num=1, **SETTINGS)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no pairs.json; make pairs with `genkit pairs`"):
        Pairs(path=tmp_path)
    output = make_pairs(folder, tmp_path / "pairs", num=20, **SETTINGS)
    manifest = output / "pairs.json"
    good = manifest.read_text()
    manifest.write_text(good.replace("genkit.pairs/1", "genkit.pairs/9"))
    with pytest.raises(ValueError, match="is of format 'genkit.pairs/9'; accepted is 'genkit.pairs/1'"):
        Pairs(path=output)
    changed = json.loads(good) | {"noise_check": [0.0] * 8}
    manifest.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="seed=0 gives the noise .* here, and gave .*0.0"):
        Pairs(path=output)
    manifest.write_text(good)
    file, _ = shard_paths(output, 1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    source = Pairs(path=output)
    source.__getitems__([0, 7, 16])  # other shards are whole
    with pytest.raises(ValueError, match="shard-00001.safetensors is not what was written: its checksum differs"):
        source.__getitems__([8])
    file.write_bytes(data[:-5])
    with pytest.raises(ValueError, match="lacks 1 of 3 shards, the first is shard-00001"):
        Pairs(path=output)


def config(folder, output, run, **changes):
    values = dict(
        output_dir=str(run),
        model=dict(pretrained=str(folder)),
        objective=dict(name="rectified_flow", coupling=dict(kind="pairs")),
        data=dict(name="pairs", path=str(output)),
        global_batch_size=4,
        max_train_steps=2,
    )
    return TrainConfig(**(values | changes)).check()


def test_only_the_model_that_made_them_is_trained_on_them(folder, tmp_path):
    output = make_pairs(folder, tmp_path / "pairs", num=8, **SETTINGS)
    build(config(folder, output, tmp_path / "run"))
    lora = dict(kind="lora", rank=2)
    build(config(folder, output, tmp_path / "run", adapter=lora))
    other = tmp_path / "other"
    ClassConditionalPipeline(transformer=network(1), scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(other)
    for changes in (dict(), dict(adapter=lora)):
        with pytest.raises(ValueError, match="holds pairs of .*DiT, weights .*any_model=true"):
            build(config(other, output, tmp_path / "run", **changes))
    build(config(other, output, tmp_path / "run", data=dict(name="pairs", path=str(output), any_model=True)))


def test_fingerprint():
    first = fingerprint(network())
    assert first == fingerprint(network()) == fingerprint(network().double().float()) and first != fingerprint(
        network(1)
    )
    half = network().half()
    assert fingerprint(half) == fingerprint(half.float())


def test_reading_by_processes(folder, tmp_path):
    """The source travels to workers, and reads there what it reads here."""
    output = make_pairs(folder, tmp_path / "pairs", num=12, **SETTINGS)
    source, batch = rows(output)
    again = pickle.loads(pickle.dumps(source)).__getitems__([11, 3])
    assert torch.equal(again["x0"], batch["x0"][[11, 3]]) and torch.equal(again["eps"], batch["eps"][[11, 3]])


def test_command(folder, tmp_path):
    arguments = ["pairs", str(folder), "--output", str(tmp_path / "pairs"), "--num", "5", "--steps", "2"]
    arguments += ["--labels", "1,2", "--shard-size", "3", "--store-noise", "--quiet", "--reward", "jpeg:quality=90"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / "pairs")[1]["class_labels"].tolist() == [1, 2, 1, 2, 1]
    assert (rows(tmp_path / "pairs")[1]["score"] < 0).all()
    assert Path(result.stdout.strip()) == tmp_path / "pairs" and "scores:" not in result.output
    told = CliRunner().invoke(app, [a for a in arguments if a != "--quiet"])  # nothing is left to do
    assert Path(told.stdout.strip()) == tmp_path / "pairs"
    found = score_summary(tmp_path / "pairs")
    assert f"scores: min {found['min']:.6g}, 25% " in told.stderr and "kept 5, dropped 0" in told.stderr


def test_noise_is_that_of_the_item():
    assert torch.equal(noise(3, [5], (2,)), noise(3, range(10), (2,))[5:6])
    assert not torch.equal(noise(0, [0], (64,)), ItemRNG(0, [0]).normal((64,)))  # what training draws
