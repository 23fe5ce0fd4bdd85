"""Metrics in the course of a run, which they do not change: whose values, where they go, who shares the work."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from genkit.cli import app
from genkit.eval.inputs import read_images, to_uint8
from genkit.eval.result import Result
from genkit.eval.run import evaluate
from genkit.eval.statistics import FeatureStats
from genkit.rng import ItemRNG, hash_seed
from genkit.training import checkpoint, logs, sharding
from genkit.training.config import TrainConfig, load_config
from genkit.training.evaluation import Evaluator
from genkit.training.objectives.base import DivergedError
from genkit.training.samples import draw
from tests.training.test_trainer import weights

pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")
# Few enough samples that a batch is not full.
EVALUATION = dict(every=2, num_samples=150, num_inference_steps=2, batch_size=64, extractor="digits")
WITHOUT_LABELS = dict(network="dit", hidden_size=16, num_layers=1, num_heads=2, num_classes=0)


def results(folder):
    return {path.name: Result.load(path) for path in sorted((folder / "evaluations").iterdir())}


def test_a_run_is_not_changed_and_a_resumed_one_measures_the_same(toys, tmp_path):
    changes = dict(max_train_steps=4, checkpointing_steps=2)
    plain = toys.run(toys.digits(tmp_path / "plain", **changes))
    whole = toys.run(toys.digits(tmp_path / "whole", evaluation=EVALUATION, **changes))
    assert torch.equal(weights(plain), weights(whole))
    toys.run(toys.digits(tmp_path / "parts", evaluation=EVALUATION, **changes), stop=3)
    assert list(checkpoint.found(tmp_path / "parts")) == [2]
    torch.manual_seed(99)
    # How often is no part of what a run computes: it may change on the way.
    changes |= dict(evaluation=EVALUATION | dict(every=1), resume="latest")
    resumed = toys.run(toys.digits(tmp_path / "parts", **changes))
    assert torch.equal(weights(whole), weights(resumed))
    found, again = results(tmp_path / "whole"), results(tmp_path / "parts")
    assert list(found) == ["step-2.json", "step-4.json"] and list(again) == [f"step-{k}.json" for k in (2, 3, 4)]
    assert all(again[name].values == found[name].values for name in found)
    files = [str(tmp_path / "parts/evaluations" / name) for name in again]
    app(["eval", "report", *files, "--html", str(tmp_path / "report.html"), "--quiet"], standalone_mode=False)
    assert "training_step" in (tmp_path / "report.html").read_text()


def test_values_are_those_of_the_averaged_students_samples(toys, tmp_path):
    settings = EVALUATION | dict(metrics="frechet,accuracy,prdc:pr_k=2")
    trainer = toys.digits(tmp_path, max_train_steps=2, evaluation=settings)
    toys.run(trainer)
    result = results(tmp_path)["step-2.json"]
    run = trainer.run
    read = run.source.__getitems__(torch.arange(150) * 1797 // 150)
    rng = ItemRNG(hash_seed(run.config.seed, *b"evaluation"), range(150))
    with trainer.averaged():
        samples = draw(run, read, rng, 2, (1, 8, 8))
    want = evaluate(
        (to_uint8(read["x0"]), read["class_labels"]),
        (to_uint8(samples), read["class_labels"]),
        metrics=["frechet", "accuracy", "prdc:pr_k=2"],
        quiet=True,
    )
    assert result.values == pytest.approx(want.values, rel=1e-5)
    assert result.protocol.matched == "labels" and result.protocol.n_real == result.protocol.n_gen == 150
    assert result.protocol.metrics == want.protocol.metrics
    assert result.made_with == {"model": tmp_path.name, "training_step": 2, "steps": 2}


def test_values_are_logged(toys, tmp_path, monkeypatch):
    trainer = toys.digits(tmp_path, max_train_steps=2, model=WITHOUT_LABELS, evaluation=EVALUATION)
    logged = []
    monkeypatch.setattr(trainer.accelerator, "log", lambda values, step: logged.append((step, values)))
    toys.run(trainer)
    ((step, values),) = [(k, v) for k, v in logged if any(name.startswith("eval/") for name in v)]
    assert step == 2 and values["eval/frechet_distance"] == results(tmp_path)["step-2.json"].values["frechet_distance"]
    assert "eval/precision" in values and "eval/class_accuracy" not in values  # nobody asked this student for a class
    assert not any("eval/" in key for line in logs.read(tmp_path / logs.FILE) for key in line)


def test_other_references(toys, tmp_path):
    digits = read_images("digits")
    stats = FeatureStats(128).update(torch.randn(400, 128))
    stats.save(tmp_path / "stats.npz")
    for name in ("digits", str(tmp_path / "stats.npz")):
        trainer = toys.digits(tmp_path / name[-3:], max_train_steps=2, evaluation=EVALUATION | dict(reference=name))
        toys.run(trainer)
        protocol = results(tmp_path / name[-3:])["step-2.json"].protocol
        assert (protocol.n_real, protocol.n_gen) == ({"digits": digits.n}.get(name, 400), 150)
        assert protocol.reference == ("digits" if name == "digits" else "stats.npz")


def test_samples_that_are_not_finite_stop_the_run(toys, tmp_path, monkeypatch):
    nothing = torch.full((64, 1, 8, 8), torch.nan)
    monkeypatch.setattr("genkit.training.evaluation.draw", lambda *arguments: nothing)
    trainer = toys.digits(tmp_path, max_train_steps=4, evaluation=EVALUATION | dict(num_samples=64))
    with pytest.raises(DivergedError, match="step 2: samples hold NaN"):
        toys.run(trainer)
    assert not (tmp_path / "evaluations").exists()


def test_what_is_refused(toys, tmp_path):
    with pytest.raises(ValueError, match="every=2 needs an extractor"):
        TrainConfig(**toys.settings(tmp_path, evaluation=dict(every=2)))
    with pytest.raises(ValueError, match=r"evaluation.num_samples=1798: the data has 1797 items"):
        toys.digits(tmp_path, evaluation=EVALUATION | dict(num_samples=1798))
    for changed, message in (
        (dict(extractor="digit"), "extractor='digit' is not known; did you mean 'digits'"),
        (dict(metrics=["frecht"]), "metrics='frecht' is not known; did you mean 'frechet'"),
    ):
        with pytest.raises(ValueError, match=message):
            toys.digits(tmp_path, evaluation=EVALUATION | changed)
    trainer = toys.digits(tmp_path / "a", evaluation=EVALUATION | dict(reference="nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        toys.run(trainer)
    with pytest.raises(ValueError, match="evaluation.every=2: not with FSDP; set evaluation.every=null"):
        sharding.check(trainer.objective, sampling=None, evaluation=2)


def test_on_the_command_line(tmp_path):
    overrides = [
        f"output_dir={tmp_path}",
        "evaluation.every=5",
        "evaluation.extractor=digits",
        "evaluation.metrics='kid:subsets=0,prdc'",
    ]
    config = load_config("configs/digits/flow_matching.yaml", overrides)
    assert config.evaluation.metrics == ["kid:subsets=0", "prdc"] and config.evaluation.every == 5


class _Logs:
    """As much of an accelerator as an evaluation wants."""

    def __init__(self, rank):
        self.is_main_process = rank == 0

    def log(self, values, step):
        self.values = values


def _on_two(rank, file, trainer):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    drawn = []
    original = trainer.evaluator._drawn
    trainer.evaluator._drawn = lambda indices, *rest: drawn.append(indices) or original(indices, *rest)
    result = trainer.evaluator(7, (1, 8, 8), torch.device("cpu"), nullcontext, _Logs(rank))
    folder = trainer.config.output_dir
    (folder / f"rank-{rank}.json").write_text(json.dumps([result.values, torch.cat(drawn).tolist()]))
    # A sample that is not finite on one process stops both.
    trainer.run.inputs.decode = lambda x: x * torch.nan if rank == 1 else x
    try:
        trainer.evaluator(8, (1, 8, 8), torch.device("cpu"), nullcontext, _Logs(rank))
    except DivergedError:
        (folder / f"diverged-{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_measure_the_same(toys, tmp_path):
    trainer = toys.digits(tmp_path, evaluation=EVALUATION)
    assert isinstance(trainer.evaluator, Evaluator)
    one = trainer.evaluator(7, (1, 8, 8), torch.device("cpu"), nullcontext, _Logs(0))
    (tmp_path / "evaluations/step-7.json").unlink()
    trainer.evaluator.reference = None
    mp.start_processes(_on_two, (tmp_path / "sync", trainer), nprocs=2, start_method="fork")
    (values, first), (others, second) = (json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in (0, 1))
    assert values == others == one.values == results(tmp_path)["step-7.json"].values
    assert sorted(first + second) == list(range(150)) and first and second
    assert (tmp_path / "diverged-0").exists() and (tmp_path / "diverged-1").exists()
    assert list(results(tmp_path)) == ["step-7.json"]
