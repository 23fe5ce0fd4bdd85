import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from genkit import cli
from genkit.eval.comparison import compare
from genkit.eval.extractors.base import get_extractor
from genkit.eval.metrics.base import get_metric
from genkit.eval.metrics.kid import KernelInceptionDistance
from genkit.eval.page import main
from genkit.eval.page_images import first_blocks
from genkit.eval.page_sections import plots
from genkit.eval.reproduce import extractor_text, metric_text, run_command
from genkit.eval.result import Result
from genkit.eval.run import evaluate
from genkit.eval.runs import read_runs
from genkit.eval.selection import parse_metrics, rank_rows
from tests.eval.sweeps import MMHM, make_sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("sweep"), models=("teacher",), steps=(1, 4, 25), n=130)


@pytest.fixture
def results(folder, tmp_path):
    """The results alone, to be changed."""
    files = []
    for path in sorted(folder.glob("cells/*/result.json")):
        files.append(tmp_path / f"{path.parent.name}.json")
        shutil.copy(path, files[-1])
    return files


def change(path, **fields):
    found = json.loads(path.read_text())
    for name, value in fields.items():
        if isinstance(value, dict):
            found[name] |= value
        else:
            found[name] = value
    path.write_text(json.dumps(found))


def text(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html.replace("<wbr>", "")))


def test_everything_is_on_the_page_and_nothing_is_fetched(folder, tmp_path):
    html = main([folder], tmp_path / "p.html", mmhm=MMHM, quiet=True).read_text("utf-8")
    for head in (
        "Summary", "MMHM", "Against steps", "Against guidance", "Correlations", "Images", "Worst and best", "Classes",
        "Notes", "Protocol", "Reproduce",
    ):  # fmt: skip
        assert f"<h2>{head}</h2>" in html, head
    assert all(s.startswith(("data:image/", "#")) for s in re.findall(r'\s(?:src|href|xlink:href)="([^"]*)"', html))
    assert not re.search(r"@import|url\((?!#)|<link|<script[^>]+src|fetch\(|XMLHttp", html)
    told = text(html)
    runs, _ = read_runs([folder])
    best = rank_rows([run.row for run in runs], metrics=parse_metrics(MMHM))["rows"][0]
    winner = runs[best["mmhm_row"] - 1].name
    assert f"Winner by MMHM{winner}{best['mmhm']:.4g}; stays first in" in told
    distances = {run.name: run.result.values["frechet_distance"] for run in runs}
    assert f"frechet_distance@130 ↓{min(distances, key=distances.get)}" in told
    assert "frechet_raw" not in told.split("Protocol")[0] and "inception_score_std" not in told
    assert not re.search(r"\brow \d", told)  # rows of the table that was ranked are called by their names
    assert "made up" in told and get_extractor("digits").id in told and "torch==" in told
    assert f"genkit eval report {folder} --html {tmp_path / 'p.html'} --mmhm {MMHM}" in told


def test_the_same_twice_gives_the_same_bytes(folder, tmp_path):
    states = torch.get_rng_state()
    chosen = {"metrics": "recall,contrast", "mmhm": MMHM}
    pages = [main([folder], tmp_path / "p.html", **chosen, quiet=True).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1] and torch.equal(torch.get_rng_state(), states)


def test_names_say_what_differs(folder, results, tmp_path):
    runs, notes = read_runs([folder])
    steps = ("1 step", "4 steps", "25 steps")
    assert {r.name for r in runs} == {f"{s}, guidance 1" for s in steps} | {f"cfg, {s}, guidance 3" for s in steps}
    assert notes == [] and runs[0].settings["model"] == "teacher"
    for path in results[:2]:
        change(path, made_with={"model": "a/b/x", "steps": 4, "guidance_scale": 1.0, "guider": None}, nfe=None)
    same, _ = read_runs(results[:2])
    assert [run.name for run in same] == [f"x ({Result.load(p).protocol.generated})" for p in results[:2]]
    change(results[1], made_with={"model": "a/c/x"})
    assert [run.name for run in read_runs(results[:2])[0]] == ["a/b/x", "a/c/x"]
    doubled = tmp_path / "copy.json"
    shutil.copy(results[2], doubled)
    names = [run.name for run in read_runs([results[2], doubled])[0]]
    assert len(set(names)) == 2


def test_a_run_of_which_nothing_is_known_makes_no_name_longer(folder, results):
    change(results[0], made_with={})
    found = json.loads(results[0].read_text())
    results[0].write_text(json.dumps({**found, "made_with": {}, "nfe": None}))
    runs, _ = read_runs([folder, results[0]])
    steps = ("1 step", "4 steps", "25 steps")
    assert {r.name for r in runs[:6]} == {f"{s}, guidance 1" for s in steps} | {f"cfg, {s}, guidance 3" for s in steps}
    assert runs[6].name == found["protocol"]["generated"]


def test_a_run_that_lacks_a_metric_of_mmhm_is_named(results):
    found = json.loads(results[2].read_text())
    del found["values"]["recall"]
    results[2].write_text(json.dumps(found))
    runs, _ = read_runs(results)
    with pytest.raises(ValueError, match=f"mmhm: 'recall' is not among the values of '{runs[2].name}'$"):
        compare(runs, mmhm=parse_metrics("frechet_distance,recall"))


def test_cells_that_are_not_finished_are_counted(folder, tmp_path):
    copy = tmp_path / "sweep"
    shutil.copytree(folder, copy)
    (copy / "cells" / "teacher-4-1" / "result.json").unlink()
    runs, notes = read_runs([copy])
    assert len(runs) == 5 and notes == [f"1 of 6 cells of {copy} are not finished"]
    assert notes[0] in text(main([copy], tmp_path / "p.html", metrics="recall", quiet=True).read_text("utf-8"))


def test_other_protocols_are_refused_unless_forced(results, tmp_path):
    change(results[0], protocol={"n_gen": 50_000})
    with pytest.raises(ValueError, match=r"different protocols cannot be compared \(n_gen: 50000, 130\); --force"):
        main(results, tmp_path / "p.html", quiet=True)
    assert not (tmp_path / "p.html").exists()
    page = main(results, tmp_path / "p.html", metrics="frechet_distance", mmhm=MMHM, force=True, quiet=True)
    html = page.read_text("utf-8")
    told = text(html)
    assert (
        "Protocols differ (--force). These values may not compare, and no winner is named. The runs differ in" in told
    )
    assert "n_gen: 50000 / 130." in told and 'class="best"' not in html.split("<h2>Correlations")[0]
    assert "Winner" not in told.split("Correlations")[1]
    assert "n gen" in told and '<td data-number="50000">50,000</td>' in html
    assert "6 evaluations of different protocols" in told and "What the protocols differ in." in told
    assert "frechet_distance ↓" in told and "frechet_distance@" not in told and "--force" in told.split("Reproduce")[-1]


def test_metrics_are_chosen(folder, tmp_path):
    runs, _ = read_runs([folder])
    assert compare(runs).metrics == [
        "frechet_distance", "precision", "recall", "density", "coverage", "class_accuracy", "inception_score",
        "contrast",
    ]  # fmt: skip
    made = compare(runs, metrics=["frechet_raw", "Recall"], mmhm=parse_metrics("frechet_raw:min,recall"))
    assert made.metrics == ["frechet_raw", "recall"] and made.better("frechet_raw") == "lower"
    given = compare(runs, metrics=["prdc", "frechet", "recall"]).metrics
    assert given == ["precision", "recall", "density", "coverage", "frechet_distance"]
    with pytest.raises(ValueError, match="metrics: no run has 'lpips'. There are: frechet_distance"):
        compare(runs, metrics=["lpips"])
    with pytest.raises(ValueError, match="missing columns: lpips"):
        compare(runs, mmhm={"lpips": "min"})
    unranked = compare(runs)
    assert unranked.ranking is None and "some runs lack fid, clip_score, pick_score" in unranked.why_not
    told = text(main([folder], tmp_path / "p.html", metrics="recall", quiet=True).read_text("utf-8"))
    assert "There is no MMHM" in told and "Winner by MMHM" not in told


def test_one_run_and_infinite_values(tmp_path):
    x = torch.randint(0, 256, (9, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    evaluate(x, x, metrics=["psnr", "ssim"], extractor="none", output=tmp_path / "e", quiet=True)
    told = text(main([tmp_path / "e"], tmp_path / "p.html", quiet=True).read_text("utf-8"))
    assert "psnr ↑" in told and "inf" in told and "∞" in told and "Winner" not in told and "Correlations" not in told


def test_lines_join_the_best_and_those_without_guidance(folder):
    runs, _ = read_runs([folder])
    made = compare(runs, metrics=["frechet_distance", "contrast"])
    steps, guidance = plots(made)
    assert [d.title for d in steps.blocks[0].items] == ["frechet_distance@130 ↓", "contrast"]
    axes = guidance.blocks[0].items[0].figure.axes[0]
    (line,) = [line for line in axes.lines if line.get_linestyle() == "-"]  # one guider, with the runs of scale 1
    for x, y in zip(*line.get_data(), strict=True):
        there = [r.result.values["frechet_distance"] for r in runs if r.settings["guidance_scale"] == x]
        assert len(there) == 3 and y == min(there)
    assert [line.get_linestyle() for line in steps.blocks[0].items[1].figure.axes[0].lines] == ["None"]
    assert plots(compare(runs[:1])) == []


def test_without_guidance_is_a_line_of_its_own_beside_two_guiders(results):
    for path in results:
        if json.loads(path.read_text())["made_with"]["guider"] == "cfg":
            twin = path.with_name("apg-" + path.name)
            shutil.copy(path, twin)
            change(twin, made_with={"guider": "apg"})
    runs, _ = read_runs(sorted(results[0].parent.glob("*.json")))
    steps, guidance = (section.blocks[0] for section in plots(compare(runs, metrics=["frechet_distance"])))
    for drawn in (steps, guidance):
        assert {name for _, name in drawn.legend} == {"no guidance", "cfg", "apg"}
    lines = [line for line in guidance.items[0].figure.axes[0].lines if line.get_linestyle() == "-"]
    places = {name: line.get_xdata() for (_, name), line in zip(guidance.legend, lines, strict=True)}
    assert {name: list(x) for name, x in places.items()} == {"no guidance": [1], "cfg": [3], "apg": [3]}


def test_images_of_other_items_are_not_said_to_be_the_same(folder):
    one, two = read_runs([folder])[0][:2]
    other = replace(two, evaluation=replace(two.evaluation, items=two.evaluation.items.flip(0)))
    (strips,) = first_blocks([one, other])
    assert set(strips.heads) == {""} and "one item" not in strips.caption


def test_images_are_the_first_of_each_and_folded_beyond_eight(folder):
    runs, _ = read_runs([folder])
    (strips,) = first_blocks(runs)
    assert len(strips.rows) == 6 and len(strips.parts) == 1
    labels = runs[0].evaluation.labels
    items = runs[0].evaluation.items[:10].tolist()
    assert list(strips.heads) == [f"#{i + 1} · {labels[i]}" for i in items] and labels[items].tolist() == list(
        range(10)
    )
    assert torch.equal(strips.rows[3].images, runs[3].evaluation.images["first"][:10])
    many = first_blocks(runs * 2)[0]
    assert [len(part) for part in many.parts] == [8, 4]
    assert first_blocks([]) == []


def test_commands_measure_the_same_again(folder):
    runs, _ = read_runs([folder])
    command = run_command(next(r for r in runs if r.settings["guider"] == "cfg" and r.settings["steps"] == 4))
    assert command == (
        "genkit eval run digits pipeline:teacher --steps 4 --guider cfg:guidance_scale=3 --n 130 --extractor digits "
        "--metrics frechet,prdc,accuracy,inception_score,contrast --seed 0 --device cpu"
    )
    evaluation = replace(
        runs[0].evaluation, result=runs[0].result.model_copy(update={"command": "genkit eval run a b"})
    )
    assert run_command(replace(runs[0], evaluation=evaluation)) == "genkit eval run a b"
    for metric in (KernelInceptionDistance(subsets=3, subset_size=20), get_metric("prdc"), get_metric("realism:k=5")):
        assert get_metric(metric_text(metric.name, metric.settings)).settings == metric.settings
    assert metric_text("prdc", get_metric("prdc").settings) == "prdc"
    assert get_extractor(extractor_text(get_extractor("digits").id)).id == get_extractor("digits").id
    assert extractor_text("inception/clean/abc") == "inception:resize=clean"
    assert extractor_text("clean-fid-0.1.35/legacy_pytorch/abc") == "clean_fid:mode=legacy_pytorch"
    assert extractor_text("my own") == "my own"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent"], "absent: no such file or folder"),
        (["."], "accepted are the folder of an evaluation"),
        (["bad.json"], "bad.json: not a result of an evaluation"),
        (["list.json"], "list.json: not a result of an evaluation"),
        (["empty"], "empty: a sweep of which no cell is finished"),
        (["good.json", "good.json"], "good.json: named twice"),
        (["good.json", "--mmhm", "no metric"], "expected NAME:min or NAME:max"),
        (["good.json", "--metrics", "fid"], "no run has 'fid'"),
        (["good.json", "--html", "no/p.html"], "does not exist"),
        (["good.json", "--html", "good.json"], "would overwrite"),
    ],
)
def test_bad_arguments(arguments, message, results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"values": {"fid": 1}}')
    (tmp_path / "list.json").write_text("[1")
    (tmp_path / "empty" / "cells" / "a").mkdir(parents=True)
    shutil.copy(results[0], "good.json")
    html = [] if "--html" in arguments else ["--html", "p.html"]
    out = CliRunner().invoke(cli.app, ["eval", "report", *arguments, *html])
    assert out.exit_code != 0 and message in str(out.exception), out.exception
    assert not (tmp_path / "p.html").exists()


def test_command(folder, tmp_path):
    path = tmp_path / "p.html"
    out = CliRunner().invoke(
        cli.app, ["eval", "report", str(folder), "--html", str(path), "--metrics", "recall", "--title", "Mine"]
    )
    assert out.exit_code == 0 and str(path) in out.output.replace("\n", "")
    assert "<h1>Mine</h1>" in path.read_text("utf-8")
    quiet = CliRunner().invoke(
        cli.app, ["eval", "report", str(folder / "cells" / "teacher-4-1"), "--html", str(path), "--quiet"]
    )
    assert quiet.exit_code == 0 and quiet.output == ""


def test_notes_call_runs_by_their_names(results, tmp_path):
    twin = tmp_path / "twin.json"
    shutil.copy(results[0], twin)
    html = main([results[0], twin], tmp_path / "p.html", metrics="recall", mmhm="recall,precision", quiet=True)
    one, two = (run.name for run in read_runs([results[0], twin])[0])
    assert f"A tie of “{one}”, “{two}”, broken by" in text(html.read_text("utf-8"))
