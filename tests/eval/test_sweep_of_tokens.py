"""Sweeps over networks that draw tokens: their own settings are axes."""

import json
import shlex

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from genkit import cli
from genkit.eval import generated
from genkit.eval.asked import matched
from genkit.eval.cells import cells
from genkit.eval.generated import generated_images
from genkit.eval.inputs import drawn, read_images
from genkit.eval.page import main as write_page
from genkit.eval.reproduce import run_command
from genkit.eval.result import Result
from genkit.eval.run import evaluate
from genkit.eval.runs import read_runs, telling
from genkit.eval.selection import rank_rows
from genkit.eval.sweep import main
from genkit.networks.gpt import GPT
from genkit.networks.mar import MAR
from genkit.pipelines.autoregressive import AutoregressivePipeline
from genkit.pipelines.by_name import parse_settings
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline
from genkit.step_annealing import StepAnnealer


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    torch.manual_seed(0)
    network = GPT(hidden_size=16, num_layers=1, num_heads=2)
    nn.init.normal_(network.out.weight, std=0.5)
    folder = tmp_path_factory.mktemp("gpt") / "tiny"
    AutoregressivePipeline(network.eval()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mar(tmp_path_factory):
    torch.manual_seed(0)
    network = MAR(hidden_size=16, num_layers=1, num_heads=2, head_width=16, head_layers=1, buffer_size=2)
    for weight in (network.head.out.weight, network.head.modulation.weight):
        nn.init.normal_(weight, std=0.05)
    folder = tmp_path_factory.mktemp("mar") / "tiny"
    MaskedAutoregressivePipeline(network.eval()).save_pretrained(folder)
    return folder


@pytest.fixture
def made(monkeypatch):
    """The images that networks are asked for, a list a batch."""
    asked, make = [], generated.Model.make
    monkeypatch.setattr(generated.Model, "make", lambda self, items: asked.append(list(items)) or make(self, items))
    return asked


def run(model, output, **settings):
    settings = {"n": 20, "batch_size": 10, "device": "cpu", "quiet": True, "metrics": ["contrast"], **settings}
    return main(str(model), "digits", output, **settings)


def by_hand(pipe, **settings):
    digits = drawn(read_images("digits"), 20, 0, "reference")
    return evaluate(
        digits, generated_images(pipe, matched(digits), batch_size=10, **settings), metrics=["contrast"], quiet=True
    )


def test_settings_of_a_gpt(gpt, tmp_path, made):
    found = run(gpt, tmp_path / "sweep", guidance="1,2", over="top_k=[0,3],temperature=[1.0,0.5]")
    rows = {(row["guidance_scale"], row["top_k"], row["temperature"]): row for row in found["rows"]}
    assert rows.keys() == {(w, k, t) for w in (1.0, 2.0) for k in (0, 3) for t in (1.0, 0.5)}
    assert {row["nfe"] for key, row in rows.items() if key[0] == 1} == {64}
    assert {row["nfe"] for key, row in rows.items() if key[0] == 2} == {128}
    assert "steps" not in rows[1.0, 0, 1.0] and len({row["contrast"] for row in rows.values()}) == 8
    told = {"guidance_scale": 2.0, "top_k": 3, "temperature": 0.5}
    same = by_hand(AutoregressivePipeline.from_pretrained(gpt), arguments=told)
    assert same.values["contrast"] == rows[2.0, 3, 0.5]["contrast"]
    made.clear()
    more = run(gpt, tmp_path / "sweep", guidance="1,2", over="top_k=[0,3,5],temperature=[1.0,0.5]")
    assert len(more["rows"]) == 12 and sum(map(len, made)) == 4 * 20  # those that were there are not made again


def test_steps_of_a_mar(mar, tmp_path):
    steps = "6,linear:hi=6,lo=2,cosine:budget=20,lo=2"
    found = run(mar, tmp_path / "sweep", steps=steps, guidance="1,3", arguments="num_ar_steps=4")
    rows = {(row["steps"], row["guidance_scale"]): row for row in found["rows"]}
    texts = (6, "linear:hi=6,lo=2", "cosine:budget=20,lo=2")
    assert [row["steps"] for row in found["rows"]] == [6, texts[2], texts[1]] * 2  # numbers first, by guidance
    assert rows.keys() == {(text, w) for text in texts for w in (1.0, 3.0)}
    calls = [StepAnnealer(budget=20, lo=2, kind="cosine").total(4) if "b" in str(t) else 0 for t in texts]
    assert [rows[t, 1.0]["head_calls"] for t in texts] == [24, 15, calls[2]] and 15 < calls[2] <= 20
    assert all(row["num_ar_steps"] == 4 for row in found["rows"])
    pipe = MaskedAutoregressivePipeline.from_pretrained(mar)
    told = {"num_ar_steps": 4, "guidance_scale": 3.0}
    same = by_hand(pipe, num_inference_steps=StepAnnealer(6, 2), arguments=told)
    assert same.values["contrast"] == rows["linear:hi=6,lo=2", 3.0]["contrast"]
    ranked = rank_rows(found["rows"], metrics={"contrast": "max"})
    assert len(ranked["rows"]) == 6
    page = write_page([tmp_path / "sweep"], tmp_path / "page.html", quiet=True).read_text()
    assert "linear:hi=6,lo=2" in page
    commands = [run_command(one) for one in read_runs([tmp_path / "sweep"])[0]]
    settings = {tuple(sorted(row.items())) for row in ({"num_ar_steps": 4, "guidance_scale": w} for w in (1.0, 3.0))}
    found = [shlex.split(command) for command in commands]
    told = [parse_settings("set", words[words.index("--set") + 1]) for words in found]
    assert {tuple(sorted(one.items())) for one in told} == settings
    assert {words[words.index("--steps") + 1] for words in found} == {"6", *texts[1:]}


def test_what_guidance_alone_reads_is_one_cell_without(mar):
    pipe = MaskedAutoregressivePipeline.from_pretrained(mar)
    over = {"guidance_schedule": ["linear", "constant"], "num_ar_steps": [4, 8]}
    found = cells(pipe, steps=[5], guidance=[1.0, 2.0], over=over)
    said = [(c.told["guidance_scale"], c.told.get("guidance_schedule"), c.told["num_ar_steps"]) for c in found]
    assert sorted(said, key=str) == sorted(
        [(1.0, None, 4), (1.0, None, 8), *((2.0, s, k) for s in ("linear", "constant") for k in (4, 8))], key=str
    )
    assert len({cell.name for cell in found}) == 6
    assert [c.cost for c in found] == [c.told["num_ar_steps"] * 6 * c.told["guidance_scale"] for c in found]
    (own,) = cells(pipe)
    assert own.steps == 100 and own.made_with == {"steps": 100, "guidance_scale": 1.0}


def test_the_command(mar, tmp_path):
    call = f"eval sweep {mar} digits --output {tmp_path / 'sweep'} --steps 4,linear:hi=4,lo=2 --over num_ar_steps=[2,4]"
    call += " --guidance 2 -n 20 --metrics contrast --device cpu --set temperature=0.9"
    done = CliRunner().invoke(cli.app, call.split(), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("num ar", "linear:hi=4,lo=2", "calls"))
    rows = json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]
    axes = {(s, k) for s in (4, "linear:hi=4,lo=2") for k in (2, 4)}
    assert {(row["steps"], row["num_ar_steps"]) for row in rows} == axes
    result = Result.load(next(tmp_path.glob("sweep/cells/linear*/result.json")))
    assert result.made_with["temperature"] == 0.9


def test_settings_that_are_lists_tell_cells_apart():
    assert telling([{"a": [1], "b": [1]}, {"a": [1, 2], "b": [1]}]) == ["a"]


REFUSED = [
    ("gpt", dict(steps="4"), "num_inference_steps=4: a pipeline of the class AutoregressivePipeline takes none"),
    ("gpt", dict(guider="apg"), "guider='apg': AutoregressivePipeline takes none; its axes are guidance"),
    ("gpt", dict(scheduler="pndm"), "scheduler='pndm': AutoregressivePipeline takes none"),
    ("gpt", dict(adapters=["somewhere"]), "adapters=['somewhere']: AutoregressivePipeline takes none"),
    ("gpt", dict(over="top_k=[5,-1]"), "top_k=-1: expected 0, for all, or more"),
    ("gpt", dict(over="topk=[5]"), "did you mean 'top_k'"),
    ("gpt", dict(over="top_k=5"), "over: top_k=5: expected a list, as top_k=[5]"),
    ("gpt", dict(over="top_k=[]"), "top_k: no value; at least one is needed"),
    ("gpt", dict(over="top_k=[5,5]"), "top_k: 5 is named twice"),
    ("gpt", dict(over="top_k"), "over: 'top_k' is not of the form key=value"),
    ("gpt", dict(over="top_k=[5]", arguments="top_k=3"), "top_k is among the arguments of every call, too"),
    ("gpt", dict(over="guidance_scale=[2,3]"), "over: guidance_scale is an axis of its own: guidance"),
    ("gpt", dict(guidance="-1"), "guidance_scale=-1.0"),
    ("mar", dict(over="num_inference_steps=[2]"), "over: num_inference_steps is an axis of its own: steps"),
    ("mar", dict(over="num_ar_steps=[4,17]"), "num_ar_steps=17: accepted are 1 to 16, the number of tokens"),
    ("mar", dict(steps="linear:hi=4,lo=5"), "lo=5, hi=4"),
    ("mar", dict(steps="linear:budget=79"), "budget=79: 16 steps of at least lo=5 take 80"),
    ("mar", dict(steps="lineer:hi=4"), "steps='lineer:hi=4': expected whole numbers"),
    ("mar", dict(steps="0"), "num_inference_steps=0: accepted are 1 to 1000"),
]


@pytest.mark.parametrize(("model", "settings", "words"), REFUSED)
def test_refused_before_the_network_is_called(model, settings, words, tmp_path, made, request):
    with pytest.raises(ValueError) as error:
        run(request.getfixturevalue(model), tmp_path / "sweep", **settings)
    assert words in str(error.value) and not made and not (tmp_path / "sweep").exists()
