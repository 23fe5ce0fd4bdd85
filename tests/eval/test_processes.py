"""One, two and three processes: the same figures, every image once, one that writes."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from genkit.eval import command, processes, sweep
from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import ImageSet, UnreadableImage, drawn, read_images
from genkit.eval.processes import alone, gather, join, own, rank_and_count
from genkit.eval.result import Result
from genkit.eval.run import measure

_spec = importlib.util.spec_from_file_location("sweeping", Path(__file__).with_name("sweeping.py"))
sweeping = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweeping)

COUNTS = (1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Once here, instead of in every process that is forked off."""
    measure(drawn(read_images("digits"), 2, 0, "reference"), get_extractor("digits"), quiet=True)


def save(folder, rank, value):
    (folder / f"{rank}.json").write_text(json.dumps(value))


def saved(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 20, 101])
def test_own_gives_every_row_once_and_whole_batches(monkeypatch, n, batch_size):
    for count in (1, 2, 3, 7):
        shares = []
        for rank in range(count):
            monkeypatch.setattr(processes, "rank_and_count", lambda rank=rank, count=count: (rank, count))
            shares.append(own(n, batch_size))
        assert torch.equal(torch.cat(shares), torch.arange(n))
        assert all(len(share) == 0 or int(share[0]) % batch_size == 0 for share in shares)


def _joined(rank, folder):
    device = join("cpu")
    here = [str(device), *rank_and_count(), gather(rank)]
    with alone():
        here += [*rank_and_count(), gather(rank)]
    assert join("cpu") == device and join(None).type == "cpu"
    for wrong in ("cuda:1", "cuda"):
        try:
            join(wrong)
            here.append("taken")
        except ValueError as error:
            here.append(str(error))
    save(folder, rank, here)


def test_processes_join_and_can_be_alone(tmp_path):
    sweeping.launch(2, _joined, tmp_path)
    for rank, found in enumerate(saved(tmp_path)):
        assert found[:7] == ["cpu", rank, 2, [0, 1], 0, 1, [rank]]
        assert "accepted is 'cuda'" in found[7] and "started for 'cpu'" in found[8]


def test_a_process_by_itself_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == torch.device("cpu") and rank_and_count() == (0, 1)
    assert not torch.distributed.is_initialized()


def _measured(rank, folder, n):
    """Which images each process loads, and what all have in the end; one image cannot be read."""
    join("cpu")
    digits, loaded = drawn(read_images("digits"), n + 1, 0, "reference"), []

    def load(indices):
        if 1 in indices.tolist():
            raise UnreadableImage(1, "image 1 is broken")
        loaded.extend(indices.tolist())
        return digits.load(indices)

    images = ImageSet("some", n + 1, load, digits.labels)
    side = measure(images, get_extractor("digits"), batch_size=4, quiet=True)
    tensors = {"mean": side.stats.mean, "scatter": side.stats.scatter, "features": side.features, "labels": side.labels}
    save_file({**tensors, "logits": side.logits}, folder / f"{rank}.safetensors")
    save(folder, rank, {"loaded": loaded, "n": side.stats.n, "notes": side.images.notes})


@pytest.mark.parametrize("n", [2, 22])
def test_statistics_agree_to_rounding_and_no_image_counts_twice(tmp_path, n):
    """2: fewer batches than processes; 22: no number of processes divides the batches."""
    for count in COUNTS:
        folder = tmp_path / str(count)
        folder.mkdir()
        sweeping.launch(count, _measured, folder, n)
        told = saved(folder)
        assert sorted(i for one in told for i in one["loaded"]) == [0, *range(2, n + 1)]
        assert all(one["n"] == n and "1 of" in one["notes"][0] and len(one["notes"]) == 1 for one in told)
        whole = load_file(tmp_path / "1" / "0.safetensors")
        for rank in range(count):
            found = load_file(folder / f"{rank}.safetensors")
            for name in ("features", "logits", "labels"):
                assert torch.equal(found[name], whole[name])
            for name in ("mean", "scatter"):
                limit = 1e-12 * whole[name].abs().max()
                torch.testing.assert_close(found[name], whole[name], rtol=1e-12, atol=limit.item())


def _evaluated(rank, folder, model):
    settings = {"batch_size": 8, "device": "cpu", "n": 30}
    metrics = ["frechet", "prdc", "accuracy", "kid:subset_size=10", "inception_score", "contrast"]
    made = command.main("digits", f"pipeline:{model}", metrics=metrics, json_path=folder / "run" / "r.json",
                        output=folder / "evaluation", **settings)  # fmt: skip
    table = sweep.main(
        str(model), "digits", folder / "sweep", steps="1,2", guidance="1,2", mmhm="frechet_distance:min,coverage:max",
        metrics=metrics, csv_path=folder / "run" / f"{rank}.csv", **settings
    )  # fmt: skip
    save(folder / "told", rank, [made.model_dump(mode="json"), table])


def test_a_run_and_a_sweep_are_the_same_on_any_number_of_processes(tmp_path, capfd):
    model = sweeping.save_model(tmp_path / "tiny")
    found, printed = {}, {}
    for count in COUNTS:
        folder = tmp_path / str(count)
        (folder / "run").mkdir(parents=True)
        (folder / "told").mkdir()
        sweeping.launch(count, _evaluated, folder, model)
        told = saved(folder / "told")
        assert len(told) == count and all(one == told[0] for one in told)
        assert [path.name for path in folder.glob("run/*.csv")] == ["0.csv"]
        assert Result.load(folder / "run" / "r.json").model_dump(mode="json") == told[0][0]
        found[count], printed[count] = told[0], capfd.readouterr().out
        assert not list(folder.rglob("*.partial")) and not list(folder.rglob("genkit-images-*"))
    assert printed[1].count("stability:") == printed[2].count("stability:") == printed[3].count("stability:") == 1
    one, table = found[1]
    assert (one["nfe"], one["protocol"]["n_gen"], len(table["rows"])) == (32, 30, 4)
    for count in COUNTS[1:]:
        run, other = found[count]
        assert run["values"] == pytest.approx(one["values"], rel=1e-12, abs=1e-15)
        assert {k: v for k, v in run.items() if k != "values"} == {k: v for k, v in one.items() if k != "values"}
        assert [r["nfe"] for r in other["rows"]] == [r["nfe"] for r in table["rows"]]
        for row, wanted in zip(other["rows"], table["rows"], strict=True):
            numbers = [k for k, v in wanted.items() if isinstance(v, float)]
            assert [row[k] for k in numbers] == pytest.approx([wanted[k] for k in numbers], rel=1e-12, abs=1e-15)
        for name in ("images", "scores"):
            for path in (tmp_path / "1").glob(f"sweep/cells/*/{name}.safetensors"):
                a, b = load_file(path), load_file(tmp_path / str(count) / path.relative_to(tmp_path / "1"))
                assert a.keys() == b.keys() and all((a[k].double() - b[k].double()).abs().max() <= 1e-9 for k in a)


@pytest.mark.slow
def test_under_accelerates_launcher(tmp_path):
    model, root = sweeping.save_model(tmp_path / "tiny"), Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += f" --dynamo_backend no --main_process_port {port} -m genkit.cli eval"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for text in (
        f"sweep {model} digits --output {tmp_path / 'sweep'} --steps 1 --guidance 1,2 -n 21 --batch-size 4",
        f"run digits digits --n 21 --json {tmp_path / 'r.json'}",
    ):
        call = [sys.executable, *launch.split(), *text.split()]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
    assert Result.load(tmp_path / "r.json").protocol.n_gen == 21
    assert len(list(tmp_path.glob("sweep/cells/*/result.json"))) == 2
