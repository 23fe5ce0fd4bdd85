import csv
import json

import pytest
from typer.testing import CliRunner

from genkit import cli
from genkit.eval.result import Protocol, Result, differences
from genkit.eval.selection import parse_metrics, parse_weights, rank_rows, read_bounds
from genkit.eval.tables import read_rows, write_csv

HEAD = "model,steps,CFG,FID,is_mean,CLIP Score,PickScore,protocol"
ROWS = [
    "a,1,7,5.3,197.17,29.29,20.59,one",
    "b,1,1,15.27,277.9,28.29,21.34,one",
    "c,5,1,11.93,286.81,29.38,20.34,one",
    "d,5,7,8.27,171.56,28.35,20.93,one",
    "[e],25,7,60,20,22,18.5,one",
]


def put(path, *lines, head=HEAD):
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return path


def call(*args):
    return CliRunner().invoke(cli.app, ["eval", "mmhm", *map(str, args)])


def refuses(*args):
    """The message of a refused call."""
    out = call(*args)
    assert isinstance(out.exception, (ValueError, FileNotFoundError)), out.output
    return str(out.exception)


def row(fid=10.0, score=100.0, clip=28.0, pick=20.0, **more):
    return {"fid": fid, "is": score, "clip": clip, "pick_score": pick, **more}


SPREAD = [row(1, 1, 1, 1), row(9, 9, 9, 9), row(3, 4, 5, 6), row(4, 5, 6, 3)]


def test_from_csv_to_every_output(tmp_path):
    table = put(tmp_path / "t.csv", *ROWS)
    paths = [tmp_path / f"out.{ending}" for ending in ("json", "csv", "html")]
    out = call(table, "--json", paths[0], "--csv", paths[1], "--html", paths[2])
    assert out.exit_code == 0, out.output
    assert "0.90379" in out.output and "note: without row 5 row 1 wins" in out.output and "75%" in out.output
    result = json.loads(paths[0].read_text())
    assert [r["model"] for r in result["rows"]] == ["b", "c", "a", "d", "[e]"]
    assert [r["mmhm"] for r in result["rows"]] == pytest.approx([0.9038, 0.8555, 0.8212, 0.7779, 0.001], abs=5e-5)
    assert [r["mmhm_pareto"] for r in result["rows"]] == [True, True, True, True, False]
    assert result["bounds"]["fid"] == {"min": 5.3, "max": 60} and result["stability"] == 0.75
    assert result["rows"][0]["mmhm_u_pick_score"] == 1 and result["forced"] is None
    with paths[1].open() as file:
        ranked = list(csv.DictReader(file))
    assert [float(r["mmhm"]) for r in ranked] == [r["mmhm"] for r in result["rows"]]
    assert ranked[0]["FID"] == "15.27" and ranked[0]["mmhm_forced"] == "false" and ranked[4]["model"] == "[e]"
    assert "<html" in paths[2].read_text() and "0.90379" in paths[2].read_text()
    assert table.read_text().splitlines()[1:] == ROWS


def test_the_result_is_a_table_again(tmp_path):
    first, again = tmp_path / "first.csv", tmp_path / "again.csv"
    call(put(tmp_path / "t.csv", *ROWS), "--csv", first, "--quiet")
    assert call(first, "--csv", again, "--quiet").output == ""
    strip = lambda path: [{**r, "mmhm_row": None} for r in read_rows(path)]  # noqa: E731
    assert strip(first) == strip(again)


def test_the_bounds_of_an_earlier_result(tmp_path):
    earlier = tmp_path / "r.json"
    call(put(tmp_path / "t.csv", *ROWS), "--json", earlier, "--quiet")
    some = put(tmp_path / "some.csv", ROWS[0], ROWS[1], ROWS[4].replace(",60,", ",90,"))
    out = call(some, "--bounds", earlier, "--json", tmp_path / "s.json")
    assert out.exit_code == 0 and "note: outside of the bounds: row 3" in out.output
    result = json.loads((tmp_path / "s.json").read_text())
    whole = {r["model"]: r["mmhm"] for r in json.loads(earlier.read_text())["rows"] if r["model"] in "ab[e]"}
    assert {r["model"]: r["mmhm"] for r in result["rows"]} == whole  # the outlier is clipped to where it was
    assert result["bounds_given"] and result["clip"] and result["stability"] == 1
    out = call(some, "--bounds", earlier, "--no-clip")
    assert "whose score means little" in out.output
    assert "without bounds" in refuses(some, "--no-clip")
    plain = tmp_path / "b.json"
    plain.write_text(json.dumps({"FID": {"min": 0, "max": 1}, "is_mean": {"min": 0, "max": 2}}))
    assert read_bounds(plain) == ({"fid": {"min": 0, "max": 1}, "inception_score": {"min": 0, "max": 2}}, [])
    other = put(tmp_path / "o.csv", ROWS[0].replace("one", "two"))
    assert "different protocols" in refuses(other, "--bounds", earlier)
    assert "expected clip_score" in refuses(some, "--bounds", plain)
    plain.write_text("[1]")
    assert "expected {" in refuses(some, "--bounds", plain)
    plain.write_text("{")
    assert "not JSON" in refuses(some, "--bounds", plain)
    assert "no such file" in refuses(some, "--bounds", tmp_path / "none.json")


def test_different_protocols_are_refused_or_forced_in_writing(tmp_path):
    table = put(tmp_path / "t.csv", *ROWS[:4], ROWS[4].replace("one", "two"))
    assert "different protocols" in (message := refuses(table)) and "'one', 'two'" in message and "--force" in message
    outputs = ("--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    out = call(table, "--force", *outputs)
    assert out.exit_code == 0 and "note: forced: rows differ in protocol" in out.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["forced"] == {"protocol": ["one", "two"]}
    assert all(r["mmhm_forced"] for r in result["rows"])
    assert {r["mmhm_forced"] for r in read_rows(tmp_path / "r.csv")} == {"true"}
    assert "different protocols" in refuses(tmp_path / "r.csv")  # forced once is not forced for ever
    untold = put(tmp_path / "u.csv", *ROWS[:4], ROWS[4].removesuffix("one"))
    assert "'one', None" in refuses(untold)


def test_what_of_a_protocol_counts():
    same = {"extractor": "x", "reference": "r", "n_real": 9, "n_gen": 9, "seed": 0, "device": "cpu", "versions": {}}
    one = same | {"generated": "a", "metrics": {"fid": {"k": 1}}}
    two = one | {"generated": "b", "device": "cuda", "metrics": {"fid": {"k": 1}, "kid": {}}}
    assert set(one) <= set(Protocol.model_fields)
    assert differences([one, two]) == {}
    assert differences([one, two | {"n_gen": 8}]) == {"n_gen": [9, 8]}
    assert differences([one, two | {"metrics": {"fid": {"k": 2}}}]) == {"metrics.fid": [{"k": 1}, {"k": 2}]}
    assert differences([{"a": 1, "b": 2}, {"b": 2, "a": 1}]) == {}
    assert differences([{"resize": "pil"}, {"resize": "torch"}]) == {"resize": ["pil", "torch"]}
    assert differences([{}, {"resize": "pil"}]) == {"resize": [None, "pil"]}
    flat = [row(**{"protocol.resize": "pil", "protocol.n": 1}), row(protocol='{"n": 1, "resize": "pil"}')]
    assert rank_rows(flat)["forced"] is None


def test_results_of_eval_run_are_rows(tmp_path):
    results = []
    for i, r in enumerate(SPREAD):
        protocol = Protocol(
            extractor="x",
            reference="r",
            generated=f"m{i}",
            n_real=9,
            n_gen=9,
            metrics={},
            seed=0,
            device="cpu",
            versions={},
        )
        results.append(Result(values=r, nfe=i, protocol=protocol).model_dump(mode="json"))
    (tmp_path / "t.json").write_text(json.dumps(results))
    got = rank_rows(read_rows(tmp_path / "t.json"))
    assert {r["generated"]: r["mmhm"] for r in got["rows"]} == {
        f"m{r['mmhm_row'] - 1}": r["mmhm"] for r in rank_rows(SPREAD)["rows"]
    }
    write_csv(tmp_path / "t.csv", got["rows"])
    assert [r["mmhm"] for r in rank_rows(read_rows(tmp_path / "t.csv"))["rows"]] == [r["mmhm"] for r in got["rows"]]
    results[1]["protocol"]["extractor"] = "y"
    (tmp_path / "t.json").write_text(json.dumps({"rows": results}))
    with pytest.raises(ValueError, match="extractor: 'x', 'y'"):
        rank_rows(read_rows(tmp_path / "t.json"))


@pytest.mark.parametrize(
    ("more", "winner", "told"),
    [
        ([{}, {}], 1, "order in the table"),
        ([{"nfe": 8}, {"nfe": 2}], 2, "fewer network calls, then order in the table"),
        ([{"nfe": ""}, {"nfe": 2}], 2, "fewer network calls"),
        ([{"nfe": 1, "steps": 9}, {"nfe": 2, "steps": 1}], 1, "fewer network calls"),
        ([{"steps": 2, "calls_per_step": 2}, {"steps": 3, "calls_per_step": 1}], 2, "fewer network calls"),
        ([{"steps": 2, "cfg": 7}, {"steps": 2, "cfg": 1.5}], 2, "fewer network calls, then lower guidance"),
        ([{"nfe": 4, "head_calls": 24}, {"nfe": 4, "head_calls": 15}], 2, "then fewer calls of the diffusion head"),
    ],
)
def test_ties_are_broken_and_told(more, winner, told):
    """Both rows before an ordinary one are equal, and the best."""
    ordinary = dict.fromkeys(more[0], 1)
    got = rank_rows([row(1, 9, 9, 9, **more[0]), row(1, 9, 9, 9, **more[1]), row(5, 5, 5, 5, **ordinary)])
    assert got["rows"][0]["mmhm_row"] == winner
    assert any(n.startswith("a tie of rows") and told in n for n in got["notes"])


def test_notes():
    notes = rank_rows([row(1), row(2)])["notes"]
    assert any(n.startswith("2 rows: fewer than 5") for n in notes)
    assert any("by which protocol" in n for n in notes)
    assert sum("decides nothing" in n for n in notes) == 3
    notes = rank_rows([*SPREAD, row(2, 3, 4, 7, protocol="x")], force=True)["notes"]
    assert [n for n in notes if not n.startswith("without row")] == [
        "forced: rows differ in protocol, and their values may not compare"
    ]


def test_other_metrics_and_weights(tmp_path):
    table = put(tmp_path / "t.csv", "a,0.1,20", "b,0.3,30", "c,0.2,28", head="name,LPIPS,psnr")
    out = call(table, "--metrics", "lpips:min,psnr:max", "--weights", "psnr=100", "--eps", 0.1)
    assert out.exit_code == 0, out.output
    rows = read_rows(table)
    chosen = {"metrics": parse_metrics("lpips:min,psnr:max"), "eps": 0.1}
    assert rank_rows(rows, **chosen)["rows"][0]["name"] == "c"
    got = rank_rows(rows, weights=parse_weights("psnr=100"), **chosen)
    assert got["rows"][0]["name"] == "b" and got["weights"] == {"lpips": 1, "psnr": 100}
    assert rank_rows(rows, metrics={"Lpips": "min", "PSNR": "max"}, eps=0.1)["bounds"]["PSNR"] == {"min": 20, "max": 30}
    assert parse_metrics("clip, IS:min") == {"clip_score": "max", "inception_score": "min"}
    assert parse_metrics("fd_dinov2,psnr,recall") == {"fd_dinov2": "min", "psnr": "max", "recall": "max"}
    for text in ("no metric", "lpips:low", "", "fid,fid", "saturation"):
        with pytest.raises(ValueError, match="metrics: "):
            parse_metrics(text)
    for text in ("fid", "fid=much", "clip=1,clip_score=2"):
        with pytest.raises(ValueError, match="weights: "):
            parse_weights(text)
    assert "'fid' is not among" in refuses(table, "--metrics", "psnr:max", "--weights", "fid=1")


@pytest.mark.parametrize("cell", ["NaN", "inf", "high", ""])
def test_a_bad_cell_is_named_by_row_and_column(cell, tmp_path):
    table = put(tmp_path / "t.csv", *ROWS[:2], f"c,5,1,{cell},286.81,29.38,20.34,one")
    assert "t.csv: row 3, column 'FID': " + (repr(cell) if cell else "empty") in refuses(table)


@pytest.mark.parametrize("cell", [None, True, [1], float("nan"), "1e999"])
def test_a_bad_value_of_json_is_named(cell):
    with pytest.raises(ValueError, match="row 2, column 'fid'"):
        rank_rows([row(), row(fid=cell)])


def test_a_bad_tie_break_is_named():
    with pytest.raises(ValueError, match="row 1, column 'nfe': 'few'"):
        rank_rows([row(nfe="few"), row()])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "no rows"),
        ("t.csv", HEAD, "no rows"),
        ("t.csv", "fid,fid\n1,2", "2 columns are named 'fid'"),
        ("t.csv", "fid,is\n1,2,3", "row 1 has 3 cells, the head has 2"),
        ("t.csv", "fid,is\n1,2", "missing columns: clip_score or clip; pick_score or pickscore. There are: fid, is"),
        ("t.csv", "fid,is,clip,pick_score,clip score\n1,2,3,4,5", "'clip' and 'clip score' name the same thing"),
        ("t.json", "{", "not JSON"),
        ("t.json", "3", "expected a list of rows"),
        ("t.json", "[3]", "expected a list of rows"),
        ("t.json", "[]", "no rows"),
        ("t.txt", "fid", "expected a .csv or .json file"),
    ],
)
def test_refuses_tables(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    assert message in refuses(tmp_path / name)


def test_refuses_files(tmp_path):
    assert "no such file" in refuses(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refuses(tmp_path / "t.csv")
    table = put(tmp_path / "t.csv", *ROWS)
    assert "would overwrite" in refuses(table, "--csv", table)
    assert "does not exist" in refuses(table, "--json", tmp_path / "no" / "r.json")


def test_csv_cells_may_hold_line_breaks_and_commas(tmp_path):
    rows = [{"fid": 1.5, "note": 'two\nlines, "quoted"\u2028and more', "protocol": {"n": 9}}]
    write_csv(tmp_path / "t.csv", rows)
    assert read_rows(tmp_path / "t.csv") == [{**rows[0], "fid": "1.5", "protocol": '{"n": 9}'}]


def test_a_spreadsheets_mark_before_the_head_is_no_part_of_it(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbffid,n\r\n1,2\r\n")
    assert read_rows(tmp_path / "t.csv") == [{"fid": "1", "n": "2"}]


def test_a_folder_of_a_sweep_is_ranked_as_its_table(tmp_path):
    for name, value in {"a": 1.0, "b": 0.5, "c": 0.9}.items():
        protocol = Protocol(
            extractor="none", reference=None, generated=name, n_real=None, n_gen=9, metrics={}, seed=0, device="cpu",
            versions={},
        )  # fmt: skip
        result = Result(values={"psnr": value}, protocol=protocol, made_with={"model": "m", "steps": 4})
        (tmp_path / "sweep" / "cells" / name).mkdir(parents=True)
        result.save(tmp_path / "sweep" / "cells" / name / "result.json")
    (tmp_path / "sweep" / "cells" / "d").mkdir()
    out = call(tmp_path / "sweep", "--metrics", "psnr", "--json", tmp_path / "r.json")
    assert out.exit_code == 0, out.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["generated"] for row in found["rows"]] == ["a", "c", "b"]
    assert "the same in all rows: model m, steps 4" in out.output and "stability: row 1 wins" in out.output
    assert "1 of 4 cells" in out.output
