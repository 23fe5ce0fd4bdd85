import json

import pytest
from typer.testing import CliRunner

from genkit import cli
from genkit.eval.differences import KNOWN, compare, result_file
from genkit.eval.explain import main
from genkit.eval.result import Protocol, Result

PROTOCOL = dict(
    extractor="inception-2015-12-05/tf1/6726825d0af5",
    reference="photos",
    generated="ours",
    n_real=50_000,
    n_gen=50_000,
    metrics={"frechet": {}, "kid": {"subsets": 100}},
    seed=0,
    device="cpu",
    versions={"torch": "2.10"},
)


def write(path, values=None, **changes):
    Result(values=values or {"fid": 2.5}, protocol=Protocol(**PROTOCOL | changes)).save(path)
    return path


def parts(found, matters):
    return [difference.part for difference in found.differences if difference.matters is matters]


def test_every_part_of_a_protocol_is_known():
    assert set(Protocol.model_fields) - {"extractor", "generated"} <= set(KNOWN)


def test_what_matters_comes_first(tmp_path):
    a = write(tmp_path / "a.json", {"fid": 2.5, "kid": 0.1})
    b = write(
        tmp_path / "b.json",
        {"fid[clean]": 3.5, "kid": 0.3},
        extractor="inception-2015-12-05/clean/6726825d0af5",
        n_gen=5_000,
        seed=1,
        versions={"torch": "2.11"},
        metrics={"kid": {"subsets": 10}, "prdc": {"k": 5}},
        generated="theirs",
    )
    found = compare(a, b)
    assert parts(found, True) == ["resize", "n_gen", "metrics.kid"]
    assert parts(found, False) == ["seed", "versions.torch"]
    assert not found.differences[0].a == found.differences[0].b == "clean"
    assert (found.differences[0].a, found.differences[0].b) == ("tf1", "clean")
    assert found.values == {"fid | fid[clean]": (2.5, 3.5), "kid": (0.1, 0.3)}


def test_the_same_protocol_and_extractors_of_any_name(tmp_path):
    a = write(tmp_path / "a.json")
    assert not compare(a, write(tmp_path / "b.json", {"fid": 9.0}, generated="theirs")).differences
    other = compare(a, write(tmp_path / "c.json", extractor="pixels"))
    assert parts(other, True) == ["network", "resize", "weights"]
    assert other.differences[1].b is None


def test_files_and_folders(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert result_file(folder) is None and result_file(tmp_path / "absent.json") is None
    assert result_file(write(folder / "result.json")) == folder / "result.json" == result_file(folder)
    with pytest.raises(ValueError, match="one is a result and one is not"):
        main(str(folder), "digits")
    with pytest.raises(ValueError, match="n, values: A and B are results"):
        main(str(folder), str(folder), n=5, values="1,2")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="other.json is no result of genkit eval run"):
        main(str(folder), str(tmp_path / "other.json"))


def test_command(tmp_path):
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", {"fid[clean]": 3.0}, n_gen=5_000)
    options = ["--json", str(tmp_path / "out.json")]
    outcome = CliRunner().invoke(cli.app, ["eval", "doctor", str(a), str(b), *options], catch_exceptions=False)
    assert "fid | fid[clean]" in outcome.output and "n_gen" in outcome.output and "-0.5" in outcome.output
    assert json.loads((tmp_path / "out.json").read_text())["differences"][0]["matters"] is True
    outcome = CliRunner().invoke(cli.app, ["eval", "doctor", str(a), str(a)], catch_exceptions=False)
    assert "only the images differ" in outcome.output
