"""The command line: every sub-command end to end on small things; errors are one line."""

import json
import re
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from genkit import cite, cli, doctor
from genkit.networks.dit import DiT
from genkit.pipelines import ClassConditionalPipeline


def call(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def fails(monkeypatch, capsys, *args):
    """Exit status and message of the installed command."""
    monkeypatch.setattr("sys.argv", ["genkit", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


def test_help_names_every_command():
    text = call("--help").output
    assert all(name in text for name in ("demo", "train", "distill", "pairs", "sample", "eval", "doctor", "cite"))
    assert "run" in call("eval", "--help").output


def test_version():
    import genkit

    assert call("--version").output.strip() == genkit.__version__


def test_cite_a_method_and_a_run(tmp_path):
    text = call("cite", "apg").output
    assert "eprint={2410.02416}" in text and text.startswith("% apg")
    (tmp_path / "config.yaml").write_text("objective: {name: flow_map}\nmodel: {network: dit}\ndata: {name: digits}\n")
    text = call("cite", tmp_path).output
    assert "2505.18825" in text and "2212.09748" in text and "2410.02416" not in text
    rewards = "rewards: [{name: jpeg, weight: 2}], held_out: [pick_score]"
    (tmp_path / "config.yaml").write_text(f"objective: {{name: leapalign, {rewards}}}\n")
    text = call("cite", tmp_path).output
    assert "2305.13301" in text and "2305.01569" in text and "2306.09341" not in text
    quantizer = "{kind: residual, dim: 8, quantizer: {kind: fvq}}"
    (tmp_path / "config.yaml").write_text(f"objective: {{name: tokenizer}}\nmodel: {{quantizer: {quantizer}}}\n")
    text = call("cite", tmp_path).output
    assert "2509.10140" in text and "2203.01941" in text


@pytest.mark.parametrize(
    ("method", "ids"),
    [
        ("jpeg", ["2305.13301"]),
        ("hpsv2", ["2306.09341"]),
        ("fkc", ["2503.02819"]),
        ("fk_steering", ["2501.06848", "2510.05825"]),
        ("entropic", ["2510.05825"]),
        ("mmhm", ["2603.14186"]),
        ("geneval", ["2310.11513"]),
        ("lpips", ["1801.03924"]),
        ("dinov2", ["2306.04675"]),
        ("fvq", ["2509.10140"]),
        ("vq", ["1711.00937", "2110.04627"]),
        ("estimators", ["2410.06424", "2511.07903", "2308.06689"]),
        ("step_annealing", ["2505.20297"]),
    ],
)
def test_cite_rewards_and_particle_methods(method, ids):
    """Also what is no method by itself, such as an annealing that methods take."""
    text = call("cite", method).output
    assert text.startswith(f"% {method}") and [i for i in ids if i in text] == ids and text.count("@") == len(ids)


def test_cite_says_that_there_is_no_paper():
    for name in ("two_moons", "thickness"):
        assert call("cite", name).output == f"% {name}: no docstring names a paper\n"


def test_a_paper_outside_the_bibliography_is_cited_by_its_id(monkeypatch):
    monkeypatch.setattr(cite, "methods", lambda: {"new": ["2503.18886"]})
    assert "eprint={2503.18886}" in cite.bibtex("new")


def test_the_bibliography_is_whole():
    assert {i for ids in cite.methods().values() for i in ids} & set(cite.entries())
    for entry in cite.entries().values():
        assert all(field in entry for field in ("title={", "author={", "year={", "eprint={"))


def test_every_paper_that_evaluation_names_has_a_whole_entry():
    root = Path(__file__).parents[1]
    sources = [p for folder in ("eval", "genkit/rewards", "genkit/perceptual") for p in (root / folder).rglob("*.py")]
    named = {i for path in sources for i in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text(encoding="utf-8"))}
    assert len(named) > 20 and not named - set(cite.entries())


def test_cite_suggests(monkeypatch, capsys):
    code, message = fails(monkeypatch, capsys, "cite", "apgg")
    assert code == 2 and "did you mean 'apg'" in message and "Traceback" not in message


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda n: None if n == "torchmetrics" else real(n))
    rows = {package: (version, remark) for package, version, remark in doctor.versions()}
    assert rows["torchmetrics"][0] is None and "pip install 'genkit-diffusion[eval]'" in rows["torchmetrics"][1]
    assert rows["torch"][0] == torch.__version__.split("+")[0] or rows["torch"][0] == torch.__version__
    assert {name for name, works, _ in doctor.attention_backends() if works} >= {
        "native",
        "genkit, eager",
        "forward mode",
    }
    out = call("doctor")
    assert out.exit_code == 0 and "Devices" in out.output


def test_doctor_explains_a_torchvision_that_does_not_match(monkeypatch):
    import builtins

    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda n: object())
    problem = doctor.torchvision_problem()
    assert "does not match torch" in problem and "Reinstall both" in problem


def test_sample_then_evaluate(tmp_path):
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
    ClassConditionalPipeline(net, diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "pipe")
    args = ["--steps", 1, "--per-label", 8, "--guider", "cfg:guidance_scale=2", "--quiet"]
    out = call("sample", tmp_path / "pipe", "--output", tmp_path / "images", *args)
    assert out.exit_code == 0, out.output
    assert len(list((tmp_path / "images").glob("*/*.png"))) == 80 and (tmp_path / "images" / "grid.png").is_file()
    args = ["--metrics", "frechet,accuracy", "--json", tmp_path / "r.json", "--html", tmp_path / "r.html", "--nfe", 2]
    out = call("eval", "run", "digits", tmp_path / "images", *args)
    assert out.exit_code == 0, out.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["values"]["frechet_distance"] > 10 and result["nfe"] == 2 and result["protocol"]["n_gen"] == 80
    assert result["command"] is None  # nobody typed one
    assert "<html" in (tmp_path / "r.html").read_text()


def test_a_result_keeps_the_command_that_was_typed(tmp_path, monkeypatch):
    typed = ["eval", "run", "digits", "digits", "--metrics", "frechet", "--n", "40", "--json", "r.json", "--quiet"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["genkit", *typed])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads((tmp_path / "r.json").read_text())["command"] == "genkit " + " ".join(typed)


@pytest.mark.parametrize(
    "args,message",
    [
        (("eval", "run", "digits", "nowhere"), "no such file or folder"),
        (("sample", "nowhere", "--output", "x"), "no model_index.json"),
    ],
)
def test_errors_are_one_line(args, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, text = fails(monkeypatch, capsys, *args)
    assert code == 2 and message in text and len(text.strip().splitlines()) == 1


def test_train_reports_the_nearest_key(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("output_dir: x\nmodel: {network: dit}\nobjective: flow_matching\ndata: digits\n")
    out = call("train", tmp_path / "c.yaml", "max_train_step=3")
    assert out.exit_code == 1 and "max_train_steps" in (out.output + capsys.readouterr().err)
