"""Metrics as torchmetrics has them: the values of ``evaluate``, on one process and on two."""

import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("torchmetrics")

from genkit.eval.extractors.base import function_extractor
from genkit.eval.inputs import read_images
from genkit.eval.metrics import frechet, inception_score, kid, mind, prdc
from genkit.eval.run import evaluate
from genkit.eval.torchmetrics import (
    FrechetDistance,
    ImageMetric,
    InceptionScore,
    KernelInceptionDistance,
    PrecisionRecallDensityCoverage,
    SetMetric,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")


@pytest.fixture(scope="module")
def digits():
    images = read_images("digits")
    x, noise = images.load(torch.arange(300)), torch.randint(0, 40, (150, 1, 8, 8), dtype=torch.uint8)
    y = (images.load(torch.arange(300, 450)).int() + noise).clamp(0, 255).byte()
    return x, y, images.labels[300:450]


def made(name, extractor="digits", **kwargs):
    return {
        "frechet": lambda: FrechetDistance(extractor, **kwargs),
        "kid": lambda: KernelInceptionDistance(extractor, **kwargs),
        "inception_score": lambda: InceptionScore(extractor, splits=4, seed=3, **kwargs),
        "prdc": lambda: PrecisionRecallDensityCoverage(extractor, pr_k=4, **kwargs),
        "mind": lambda: SetMetric("mind:directions=50", extractor, **kwargs),
    }[name]()


WANTED = {
    "frechet": ["frechet"],
    "kid": ["kid:subsets=0"],
    "inception_score": ["inception_score:splits=4,seed=3"],
    "prdc": ["prdc:pr_k=4"],
    "mind": ["mind:directions=50"],
}
MAIN = {"frechet": "frechet_distance", "kid": "kid", "inception_score": "inception_score"}


def filled(metric, name, x, y, batch=64):
    if name != "inception_score":
        for part in x.split(batch):
            metric.update(part, real=True)
    for part in y.split(batch):
        metric.update(part, real=False)
    return metric


def wanted(name, x, y):
    values = evaluate(x, y, metrics=WANTED[name], quiet=True).values
    return values[MAIN[name]] if name in MAIN else values


def as_numbers(value):
    return {k: v.item() for k, v in value.items()} if isinstance(value, dict) else value.item()


@pytest.mark.parametrize("name", WANTED)
def test_values_are_those_of_evaluate(name, digits):
    x, y, _ = digits
    metric = filled(made(name), name, x, y)
    value = metric.compute()
    assert as_numbers(value) == pytest.approx(wanted(name, x, y), rel=1e-9)
    assert all(v.dtype == torch.float64 for v in (value.values() if isinstance(value, dict) else [value]))
    # Few rows, where evaluate takes another way to the Frechet distance.
    few = filled(made(name), name, x[:60], y[:50])
    assert as_numbers(few.compute()) == pytest.approx(wanted(name, x[:60], y[:50]), rel=1e-9)


def test_labels(digits):
    _, y, labels = digits
    metric = SetMetric("accuracy", "digits")
    metric.update(y[:70], labels=labels[:70])
    metric.update(y[70:], labels=labels[70:])
    values = evaluate(None, (y, labels), metrics=["accuracy"], quiet=True).values
    assert metric.compute()["class_accuracy"].item() == values["class_accuracy"]
    with pytest.raises(ValueError, match="labels of 150 images: got None"):
        metric.update(y)
    with pytest.raises(ValueError, match="labels of 150 images: got 3"):
        metric.update(y, labels=labels[:3])


def test_float_images_are_rounded_and_not_wrapped(digits):
    x, y, _ = digits
    plain = filled(made("frechet"), "frechet", x, y).compute()
    assert torch.equal(filled(made("frechet"), "frechet", x / 255, y.double() / 255).compute(), plain)
    for bad in (x / 127.5 - 1, x.float(), torch.full((2, 1, 8, 8), float("nan"))):
        with pytest.raises(ValueError, match=r"taken in \[0, 1\], these reach from"):
            made("frechet").update(bad, real=True)
    with pytest.raises(ValueError, match="images of torch.int64"):
        made("frechet").update(x.long(), real=True)


@pytest.mark.parametrize("name", WANTED)
def test_features_of_ones_own(name):
    x, y = torch.randn(80, 6), torch.randn(70, 6) + 0.3
    metric = filled(made(name, None, dim=6), name, x, y)
    expected = {
        "frechet": lambda: frechet.frechet_distance(x, y),
        "kid": lambda: kid.kid(x, y),
        "inception_score": lambda: inception_score.inception_score(y, splits=4, seed=3).mean,
        "prdc": lambda: prdc.prdc(x, y, pr_k=4)._asdict(),
        "mind": lambda: {"mind": mind.mind(x, y, directions=50)},
    }[name]()
    assert as_numbers(metric.compute()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["frechet", "prdc"])
def test_reset(name, keep, digits):
    x, y, _ = digits
    metric = filled(made(name, reset_real_features=not keep), name, x, y)
    first = as_numbers(metric.compute())
    metric.reset()
    if not keep:
        with pytest.raises(ValueError, match="needs? at least|at least 2"):
            metric.update(y, real=False)
            metric.compute()
        metric.reset()
        metric.update(x, real=True)
    metric.update(y, real=False)
    assert as_numbers(metric.compute()) == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("name", ["frechet", "prdc", "inception_score"])
def test_forward_clone_pickle_and_state(name, digits):
    x, y, _ = digits
    metric = made(name)
    for part, real in ((x, True), (y, False)):
        if name != "inception_score" or not real:
            assert metric(part, real=real) is None
    value = as_numbers(metric.compute())
    assert value == pytest.approx(wanted(name, x, y), rel=1e-9)
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert as_numbers(copy.compute()) == value
        copy.update(y[:50], real=False)
        assert as_numbers(copy.compute()) != value and as_numbers(metric.compute()) == value
    assert metric.state_dict() == {}
    metric.persistent(True)
    other = made(name)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other._update_count = 1
    assert as_numbers(other.compute()) == value


def test_in_a_collection_and_the_random_state_stays(digits):
    from torchmetrics import MetricCollection

    x, y, _ = digits
    state = torch.get_rng_state()
    both = MetricCollection({"fd": made("frechet"), "kid": made("kid"), "prdc": made("prdc")}, compute_groups=False)
    both.update(x, real=True)
    both.update(y, real=False)
    assert set(both.compute()) >= {"fd", "kid"} and len(both.compute()) == 6
    assert torch.equal(torch.get_rng_state(), state)


def test_metrics_of_images(digits):
    x, y, _ = digits
    metric = ImageMetric("psnr")
    batch = metric(y[:50], x[:50])
    assert batch.item() == pytest.approx(evaluate(x[:50], y[:50], metrics=["psnr"], quiet=True).values["psnr"], 1e-9)
    metric.update(y[50:], x[50:150] / 255)
    whole = evaluate(x[:150], y, metrics=["psnr"], quiet=True).values["psnr"]
    assert metric.compute().item() == pytest.approx(whole, rel=1e-9)
    jpeg = ImageMetric("reward:jpeg")
    jpeg.update(y)
    want = evaluate(None, y, metrics=["reward:jpeg"], quiet=True).values["jpeg"]
    assert jpeg.compute().item() == pytest.approx(want, rel=1e-9)
    assert jpeg.clone().compute() == jpeg.compute()
    jpeg.reset()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="no images were given"):
        warnings.simplefilter("ignore")
        jpeg.compute()


def test_what_is_refused(digits):
    x, y, labels = digits
    with pytest.raises(ValueError, match="metric='psnr' reads images; see ImageMetric"):
        SetMetric("psnr", "digits")
    with pytest.raises(ValueError, match="metric='kid' is of whole sets; see SetMetric"):
        ImageMetric("kid")
    for arguments in ((None, {}), ("digits", {"dim": 3})):
        with pytest.raises(ValueError, match="accepted is one of them"):
            FrechetDistance(arguments[0], **arguments[1])
    with pytest.raises(ValueError, match="needs logits"):
        InceptionScore(function_extractor(lambda i: i.flatten(1).float(), 64, "pixels"))
    with pytest.raises(ValueError, match="real=None: accepted by 'frechet' is True"):
        made("frechet").update(x)
    with pytest.raises(ValueError, match="real=True: accepted by 'inception_score' is False"):
        made("inception_score").update(x, real=True)
    with pytest.raises(ValueError, match=r"features of shape \(3, 5\); accepted are \(B, 6\)"):
        made("frechet", None, dim=6).update(torch.rand(3, 5), real=True)
    with pytest.raises(ValueError, match="row 1 is not finite"):
        made("frechet", None, dim=2).update(torch.tensor([[1.0, 2], [float("inf"), 2]]), real=True)
    with pytest.raises(ValueError, match="'psnr' needs reference images"):
        ImageMetric("psnr").update(y)
    with pytest.raises(ValueError, match="labels of 150 images: got 3"):
        ImageMetric("reward:digits").update(y, labels=labels[:3])


def _on_two(rank, file, x, y, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    for name in WANTED:
        # The second process has no real images at all, and both have batches of other numbers.
        metric = made(name)
        if rank == 0 and name != "inception_score":
            for part in x.split(70):
                metric.update(part, real=True)
        for part in (y[:90], y[90:])[rank].split(40):
            metric.update(part, real=False)
        found[name] = as_numbers(metric.compute())
        metric.update(y[50 * rank : 50 * rank + 40], real=False)  # goes on with its own share
        found[f"{name}, more"] = as_numbers(metric.compute())
    psnr = ImageMetric("psnr")
    psnr.update(*((y[:90], x[:90]), (y[90:], x[90:150]))[rank])
    found["psnr"] = psnr.compute().item()
    if rank == 1:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path, digits):
    x, y, _ = digits
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    mp.start_processes(_on_two, (tmp_path / "sync", x, y, results), nprocs=2, start_method="fork")
    found = results.get()
    more = torch.cat((y[:90], y[:40], y[90:], y[50:90]))
    for name in WANTED:
        assert found[name] == pytest.approx(wanted(name, x, y), rel=1e-9)
        assert found[f"{name}, more"] == pytest.approx(wanted(name, x, more), rel=1e-9)
    assert found["psnr"] == pytest.approx(evaluate(x[:150], y, metrics=["psnr"], quiet=True).values["psnr"], rel=1e-12)
