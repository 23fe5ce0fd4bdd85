"""Self-play in rounds: what it writes, that the best is promoted, and that a kill at any moment changes nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from genkit.training import rounds, scores
from genkit.training.__main__ import train
from genkit.training.build import load_pipeline
from genkit.training.config import TrainConfig, load_config
from genkit.training.fakes import spread


@pytest.fixture(scope="module")
def teacher(toys, tmp_path_factory):
    return toys.teacher(tmp_path_factory.mktemp("teacher"))


def settings(toys, pretrained, folder, **changes) -> dict:
    play = dict(
        count=2, grid=dict(beta=[0.01, 0.05]), num_fakes=50, num_samples=40, num_inference_steps=2, batch_size=20
    )
    values = toys.settings(
        folder,
        model=dict(pretrained=str(pretrained)),
        objective=dict(name="ddo", alpha=1.0),
        rounds=play | dict(evaluate_every=2) | changes.pop("rounds", {}),
        optimizer=dict(name="AdamW", lr=3e-4),
        lr_scheduler="constant",
        lr_warmup_steps=0,
        global_batch_size=32,
        max_train_steps=4,
        checkpointing_steps=2,
        ema=dict(decays=[0.5]),
    )
    return values | changes


def run(toys, teacher, folder, **changes) -> Path:
    return train(TrainConfig(**settings(toys, teacher, folder, **changes)).check(), quiet=True)


@pytest.fixture(scope="module")
def undisturbed(toys, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds") / "run"
    run(toys, teacher, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves, less the names of folders in it."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {k: v.replace(str(folder).encode(), b"") for k, v in files.items() if not k.endswith("config.yaml")}


def test_report(undisturbed, teacher):
    state = json.loads((undisturbed / "rounds.json").read_text())
    first = state["rounds"][0]
    assert first["reference"] == str(teacher)
    for entry in state["rounds"]:
        assert [s["settings"] for s in entry["students"]] == [dict(beta=0.01), dict(beta=0.05)]
        for student in entry["students"]:
            assert set(student["scores"]) == {"2", "4"}
            assert student["score"] == student["scores"][str(student["step"])] == min(student["scores"].values())
        best = min(student["score"] for student in entry["students"])
        assert (entry["promoted"] is None) == (best >= entry["reference_score"])
    assert first["promoted"] is not None  # else the tests below would see nothing of a second round
    second = state["rounds"][1]
    assert second["reference"] == str(undisturbed / "round-1/promoted")
    assert second["reference_score"] == pytest.approx(min(s["score"] for s in first["students"]), rel=1e-6)
    assert not list(undisturbed.rglob("checkpoint-*")) and not list(undisturbed.rglob(".writing-*"))


def test_fakes(undisturbed):
    files = sorted((undisturbed / "round-1/fakes").iterdir())
    shards = [load_file(f) for f in files]
    assert [len(s["fake"]) for s in shards] == [20, 20, 10]
    fakes = torch.cat([s["fake"] for s in shards])
    assert fakes.shape == (50, 1, 8, 8) and len(fakes.unique(dim=0)) == 50
    other = load_file(undisturbed / "round-2/fakes/fakes-00000.safetensors")["fake"]
    assert not torch.allclose(other, fakes[:20])


def test_the_promoted_student_is_the_pipeline(undisturbed, teacher):
    state = json.loads((undisturbed / "rounds.json").read_text())
    last = [e for e in state["rounds"] if e["promoted"] is not None][-1]
    best = load_file(undisturbed / f"round-{last['round']}/student-{last['promoted']}/best.safetensors")
    got = load_pipeline(str(undisturbed / "pipeline"), "x").transformer.state_dict()
    assert best and all(torch.equal(v, got[k]) for k, v in best.items())
    before = load_pipeline(str(teacher), "x").transformer.state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in best.items())


class Killed(BaseException):
    pass


def test_killed_at_any_moment(undisturbed, toys, teacher, tmp_path, monkeypatch):
    """Before every kind of file takes its name, and just after: the finished run is the same, bit for bit."""
    replace, seen = os.replace, []

    def note(source, target):
        seen.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    run(toys, teacher, tmp_path / "noted")
    assert contents(tmp_path / "noted") == contents(undisturbed)
    kinds = [name for i, name in enumerate(seen) if seen.index(name) == i]
    assert {"fakes-00001.safetensors", "checkpoint-2", "best.safetensors", "scores.json", "rounds.json"} <= set(kinds)
    assert {"promoted", "pipeline"} <= set(kinds)

    for after in (False, True):
        count, left = 0, [len(seen) - 1 - seen[::-1].index(name) for name in kinds]

        def dying(source, target, after=after):
            nonlocal count, left
            here, count = count in left, count + 1
            if here and not after:
                left = [n for n in left if n != count - 1]
                raise Killed
            replace(source, target)
            if here:
                left = [n for n in left if n != count - 1]
                raise Killed

        monkeypatch.setattr(os, "replace", dying)
        folder, kills = tmp_path / f"killed-{after}", 0
        for _ in range(2 * len(kinds) + 1):
            try:
                run(toys, teacher, folder, resume="latest")
                break
            except Killed:
                kills += 1
        assert kills >= 5
        got, wanted = contents(folder), contents(undisturbed)
        state, other = (json.loads(c.pop("rounds.json")) for c in (got, wanted))
        assert state["rounds"] == other["rounds"] and got == wanted


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from genkit.training import fakes, rounds
from genkit.training.__main__ import train
from genkit.training.config import load_config
from genkit.training.trainer import Trainer
steps = Trainer.steps
count = 0

def dying(self):
    global count
    for step in steps(self):
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield step

Trainer.steps = dying
train(load_config(sys.argv[1]), quiet=True)
"""


def test_a_killed_process(undisturbed, toys, teacher, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings(toys, teacher, tmp_path / "run")))
    child = subprocess.run([sys.executable, "-c", KILLED, str(recipe)], capture_output=True, timeout=600)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    state = json.loads((tmp_path / "run/rounds.json").read_text())
    assert len(state["rounds"]) == 1 and len(state["rounds"][0]["students"]) == 1
    torch.manual_seed(99)
    train(load_config(recipe, ["resume=latest"]), quiet=True)
    got, wanted = contents(tmp_path / "run"), contents(undisturbed)
    state, other = (json.loads(c.pop("rounds.json")) for c in (got, wanted))
    assert state["rounds"] == other["rounds"] and got == wanted


def test_more_rounds_go_on_where_the_others_ended(undisturbed, toys, teacher, tmp_path):
    run(toys, teacher, tmp_path / "run", rounds=dict(count=1))
    run(toys, teacher, tmp_path / "run", resume="latest")
    got, wanted = contents(tmp_path / "run"), contents(undisturbed)
    state, other = (json.loads(c.pop("rounds.json")) for c in (got, wanted))
    assert state["rounds"] == other["rounds"] and got == wanted


def test_rounds_end_where_nobody_is_better(toys, teacher, tmp_path, monkeypatch, caplog):
    values = iter([1.0, *[2.0] * 99])
    monkeypatch.setattr(scores.Score, "__call__", lambda self, run, device: next(values))
    folder = run(toys, teacher, tmp_path / "run", rounds=dict(grid={}))
    state = json.loads((tmp_path / "run/rounds.json").read_text())
    assert [e["promoted"] for e in state["rounds"]] == [None] and "rounds end here" in caplog.text
    weights = [load_pipeline(str(f), "x").transformer.state_dict() for f in (folder, teacher)]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_a_student_that_diverges_is_reported_and_not_promoted(toys, teacher, tmp_path):
    play = dict(count=1, grid=dict(beta=[1e6, 0.01]), evaluate_every=4)
    run(toys, teacher, tmp_path / "run", rounds=play, optimizer=dict(name="AdamW", lr=1e-2))
    first, second = json.loads((tmp_path / "run/rounds.json").read_text())["rounds"][0]["students"]
    assert "saturated" in first["stopped"] and "score" not in first and "score" in second


def test_low_rank_updates_are_merged(toys, tiny_pipeline, tmp_path, monkeypatch):
    """The promoted pipeline is a plain one, and predicts what the student with its updates did."""
    tiny_pipeline("sd15").save_pretrained(tmp_path / "model")
    drawn, score = [], scores.Score.__call__

    def better_every_time(self, run, device):
        drawn.append(scores.draw(run, self.source.__getitems__([0, 1]), scores.ItemRNG(3, [0, 1]), 2, (4, 16, 16)))
        assert isinstance(score(self, run, device), float)
        return -float(len(drawn))

    monkeypatch.setattr(scores.Score, "__call__", better_every_time)
    folder = train(
        TrainConfig(
            **settings(
                toys,
                tmp_path / "model",
                tmp_path / "run",
                data=dict(name="synthetic", shape=(4, 16, 16), prompts=True),
                adapter=dict(kind="lora", rank=2),
                rounds=dict(count=2, grid={}, num_fakes=6, num_samples=4, evaluate_every=4),
                optimizer=dict(name="AdamW", lr=1e-2),
                global_batch_size=4,
            )
        ).check(),
        quiet=True,
    )
    reference, student, promoted, last = drawn
    assert not torch.allclose(student, reference, atol=1e-4)
    torch.testing.assert_close(promoted, student, rtol=1e-4, atol=1e-4)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    assert "lora" not in json.dumps(dict(pipe.unet.config)).lower()


def test_autoregressive_models_play_too(toys, tmp_path):
    model = dict(network="gpt", hidden_size=16, num_layers=1, num_heads=2)
    base = toys.settings(tmp_path / "base", model=model, objective=dict(name="autoregressive"), max_train_steps=10)
    pretrained = train(TrainConfig(**base).check(), quiet=True)
    for name, fakes, n in (("online", "online", None), ("stored", "stored", 300)):
        objective = dict(name="ddo_autoregressive", fakes=fakes)
        play = dict(count=1, grid={}, num_fakes=n, num_samples=20, batch_size=20, evaluate_every=4)
        values = settings(toys, pretrained, tmp_path / name, objective=objective) | dict(rounds=play)
        folder = train(TrainConfig(**values).check(), quiet=True)
        assert load_pipeline(str(folder), "x")([1, 2], output_type="pt").images.shape == (2, 1, 8, 8)
        entry = json.loads((tmp_path / name / "rounds.json").read_text())["rounds"][0]
        assert set(entry["students"][0]["scores"]) == {"4"}
        assert (tmp_path / name / "round-1/fakes").is_dir() == (n is not None)
    with pytest.raises(ValueError, match="rounds.num_inference_steps=2: GPT takes none"):
        values = settings(toys, pretrained, tmp_path / "third", objective=objective)
        train(TrainConfig(**values).check(), quiet=True)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(model=dict(network="dit")), "the first reference is model.pretrained, which is not set"),
        (dict(teacher="somewhere"), "rounds make their references themselves"),
        (
            dict(rounds=dict(grid=dict(bta=[1]))),
            "rounds.grid: setting of the objective='bta' is not known; did you mean",
        ),
        (dict(rounds=dict(grid=dict(beta=[]))), "rounds.grid.beta is empty"),
        (dict(rounds=dict(grid=dict(beta=[-1.0]))), "objective.beta=-1.0"),
        (dict(rounds=dict(num_fakes=None)), "rounds.num_fakes=None: objective='ddo' needs fakes"),
        (dict(objective=dict(name="ddo_autoregressive")), "draws fakes itself, accepted is null"),
    ],
)
def test_bad_settings(changes, text, toys, teacher, tmp_path):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**settings(toys, teacher, tmp_path, **changes)).check()


def test_other_peoples_rounds(undisturbed, toys, teacher):
    with pytest.raises(ValueError, match="holds rounds; set resume=latest"):
        run(toys, teacher, undisturbed)
    with pytest.raises(ValueError, match="accepted is 'latest'"):
        run(toys, teacher, undisturbed, resume="checkpoint-1")
    with pytest.raises(ValueError, match=r"begun with other settings.*max_train_steps \(4 -> 5\)"):
        run(toys, teacher, undisturbed, resume="latest", max_train_steps=5)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_energy_distance():
    """Exact for two points each: 2 E|x - y| - |x - x'| - |y - y'|."""
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert scores.energy_distance(x, y) == pytest.approx(2 * (1 + 5 + 1 + 3) / 4 - 2 - 4)
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 500, 1, 2, 2)
    assert abs(scores.energy_distance(a, b)) < 0.02 < 0.2 < scores.energy_distance(a, c + 0.5)


def test_records_are_evenly_spread():
    class Ten:
        length = 10

    assert spread(Ten, 5).tolist() == [0, 2, 4, 6, 8]
    assert torch.bincount(spread(Ten, 25)).tolist() == [3, 2] * 5
    Ten.length = None
    assert spread(Ten, 3).tolist() == [0, 1, 2]


def test_json_is_whole_or_not_there(tmp_path):
    rounds._write(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        rounds._write(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
