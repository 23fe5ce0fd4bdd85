import csv
import json

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from typer.testing import CliRunner

from genkit import cli
from genkit.eval.correlate import correlate, correlations
from genkit.eval.selection import rank_rows

FOUR = ("fid", "inception_score", "clip_score", "pick_score")


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(9, 4)) * [3, 20, 1, 0.5] + [10, 200, 28, 20]
    z[:, 1] -= 4 * (z[:, 0] - 10)
    return [dict(zip(FOUR, map(float, row), strict=True)) | {"model": f"m{i}"} for i, row in enumerate(z)]


def column(rows, name):
    return [row[name] for row in rows]


@pytest.mark.parametrize("method, oracle", [("pearson", pearsonr), ("spearman", spearmanr)])
def test_agrees_with_scipy(rows, method, oracle):
    rows[3]["fid"] = rows[5]["fid"]  # a tie
    r = correlations({name: column(rows, name) for name in FOUR}, method)
    for i, a in enumerate(FOUR):
        for j, b in enumerate(FOUR):
            assert r[i, j] == pytest.approx(oracle(column(rows, a), column(rows, b))[0], abs=1e-14)
    assert (r == r.T).all() and (r.diagonal() == 1).all()


def test_exact_and_invariant():
    a = [1.0, 2.0, 4.0]
    r = correlations({"a": a, "b": [-3e200 * x for x in a], "c": [1e9 + x for x in a]})
    assert r == pytest.approx(np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1]]), abs=1e-7) and abs(r).max() == 1
    assert correlations({"a": a, "e": [np.exp(9 * x) for x in a]}, "spearman")[0, 1] == pytest.approx(1, abs=1e-15)


def test_mmhm_is_that_of_the_same_rows(rows):
    got = correlate(rows)
    assert got["metrics"] == [*FOUR, "mmhm"] and got["rows"] == 9
    scores = {row["mmhm_row"] - 1: row["mmhm"] for row in rank_rows(rows)["rows"]}
    want = pearsonr(column(rows, "fid"), [scores[i] for i in range(9)])[0]
    assert got["matrix"][0][4] == pytest.approx(want, abs=1e-14)
    assert got["better"] == {"fid": "lower"} | dict.fromkeys([*FOUR[1:], "mmhm"], "higher")
    assert "agreement is a negative value" in got["notes"][0]
    named = correlate(rows, metrics=["Pick Score", "mmhm"])
    assert named["metrics"] == ["pick_score", "mmhm"]
    assert named["notes"] == [
        "9 rows are few: of two metrics that have nothing in common, one time in 20 they give more than 0.67"
    ]
    assert not any("few" in note for note in correlate(rows * 2)["notes"])
    assert named["matrix"][0][1] == pytest.approx(got["matrix"][3][4])


def test_columns_that_cannot_correlate_are_noted_or_refused(rows):
    for row in rows:
        row |= {"psnr": 30.0, "ssim": 0.5 if row["model"] != "m4" else None, "frechet_raw": row["fid"]}
    got = correlate(rows)
    assert got["metrics"] == [*FOUR, "mmhm"]
    assert got["notes"][:2] == [
        "psnr is left out: it has one value in all rows", "ssim is left out: row 5, column 'ssim': empty"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'psnr' has one value in all rows and correlates with nothing"):
        correlate(rows, metrics=["fid", "psnr"])
    with pytest.raises(ValueError, match="row 5, column 'ssim': empty"):
        correlate(rows, metrics=["fid", "ssim"])
    with pytest.raises(ValueError, match="no column 'lpips'. There are: fid"):
        correlate(rows, metrics=["fid", "lpips"])
    with pytest.raises(ValueError, match="a correlation needs two metrics; there is fid"):
        correlate(rows, metrics=["fid", "FID"])
    del rows[2]["fid"]
    with pytest.raises(ValueError, match="row 3, column 'fid': empty"):
        correlate(rows, metrics=["mmhm", "pick_score"])


def test_columns_that_mmhm_lacks_are_named(rows):
    for row in rows:
        del row["fid"], row["pick_score"]
    got = correlate(rows)
    assert got["metrics"] == ["inception_score", "clip_score"]
    assert got["notes"][0] == "mmhm is left out: there is no column fid, pick_score"
    assert all("left out" not in note for note in correlate(rows, metrics=["is", "clip"])["notes"])


def test_chance_is_that_of_independent_pairs():
    from genkit.eval.correlate import _by_chance

    for n in (3, 5, 9):
        z = np.random.default_rng(n).normal(size=(20_000, 2, n))
        z -= z.mean(-1, keepdims=True)
        r = (z[:, 0] * z[:, 1]).sum(-1) / np.sqrt((z**2).sum(-1).prod(-1))
        assert (abs(r) > _by_chance(n)).mean() == pytest.approx(0.05, abs=0.006)


def test_too_few_rows_and_bad_values():
    with pytest.raises(ValueError, match="2 rows: a correlation needs at least 3"):
        correlate([{"fid": 1, "is": 2}] * 2)
    with pytest.raises(ValueError, match="at least 3"):
        correlations({"a": [1, 2], "b": [1, 3]})
    with pytest.raises(ValueError, match="expected as many of each"):
        correlations({"a": [1, 2, 3], "b": [1, 3, 4, 5]})
    with pytest.raises(ValueError, match="column 'b': row 2 is not a finite number"):
        correlations({"a": [1, 2, 3], "b": [1, float("nan"), 4]})
    with pytest.raises(ValueError, match="'a' has one value"):
        correlations({"a": [0.1 + 0.2, 0.3, 0.3], "b": [1, 2, 4]})  # rounding is no spread
    with pytest.raises(ValueError, match="method='kendall'"):
        correlations({"a": [1, 2, 3], "b": [1, 3, 4]}, "kendall")


def test_protocols_must_agree(rows):
    for i, row in enumerate(rows):
        row["protocol.n_gen"] = 5000 if i else 50000
    with pytest.raises(ValueError, match=r"different protocols cannot be compared \(n_gen: 50000, 5000\); --force"):
        correlate(rows)
    got = correlate(rows, force=True)
    assert got["forced"] == {"n_gen": [50000, 5000]} and "forced: rows differ in n_gen" in got["notes"][0]


def test_command(rows, tmp_path):
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    files = [f"--{kind}={tmp_path / f'o.{kind}'}" for kind in ("json", "csv", "html")]
    out = CliRunner().invoke(cli.app, ["eval", "correlate", str(table), *files, "--method", "spearman"])
    assert out.exit_code == 0, out.output
    assert "Spearman" in out.output and "mmhm ↑" in out.output and "fid ↓" in out.output
    got = json.loads((tmp_path / "o.json").read_text())
    assert got["matrix"] == correlate(rows, method="spearman")["matrix"]
    lines = list(csv.reader((tmp_path / "o.csv").open()))
    assert lines[0] == ["spearman", *FOUR, "mmhm"] and float(lines[1][2]) == got["matrix"][0][1]
    html = (tmp_path / "o.html").read_text()
    assert f"{got['matrix'][0][1]:+.2f}".replace("-", "−") in html and "Spearman" in html
    quiet = CliRunner().invoke(cli.app, ["eval", "correlate", str(table), "--quiet", "--metrics", "fid,is"])
    assert quiet.exit_code == 0 and quiet.output == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent.csv"], "no such file"),
        (["t.csv", "--json", "absent/o.json"], "does not exist"),
        (["t.csv", "--csv", "t.csv"], "would overwrite"),
        (["t.csv", "--method", "kendall"], "method='kendall'"),
        (["t.csv", "--mmhm", "fid,no metric"], "expected NAME:min"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("fid,is\n1,2\n2,1\n4,1\n")
    out = CliRunner().invoke(cli.app, ["eval", "correlate", *arguments])
    assert out.exit_code != 0 and message in str(out.exception)
