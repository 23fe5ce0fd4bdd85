"""What holds for every extractor."""

import random
import re

import numpy as np
import pytest
import torch

from genkit.eval.extractors.base import Extractor, extract, get_extractor
from genkit.registry import members

NAMES = sorted(members("genkit.eval.extractors", Extractor))
SHAPE = (6, 3, 20, 28)

# How to build, without network, those that cannot be built without arguments: ``(made, other)``, the second with other
# settings or weights. ``folder`` is empty.
READY = {
    "clip": lambda folder: _hub(folder, "clip"),
    "dinov2": lambda folder: _hub(folder, "dinov2"),
    "function": lambda folder: [f"function:path={_source(folder, size)}:pooled,dim={3 * size**2}" for size in (2, 1)],
    "inception": lambda folder: [f"inception:weights={_inception(folder)},resize={rule}" for rule in ("tf1", "clean")],
    "torchmetrics": lambda folder: [_torchmetrics(scale) for scale in (1.0, 2.0)],
}
SHAPES = {"digits": (6, 1, 8, 8)}  # of those that take no others
NO_NETWORK = {"none"}  # whose id has no hash of weights, and that look at no pixel
ELSEWHERE = {"clean_fid"}  # of a network that only its own library can read: tests/eval/extractors/test_libraries.py


def _hub(folder, kind):
    from transformers import Dinov2Config, Dinov2Model

    from tests.rewards import tiny

    if kind == "clip":
        tiny.clip(folder)
    else:
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, patch_size=14)
        Dinov2Model(Dinov2Config(**sizes, image_size=42, initializer_range=0.3)).save_pretrained(folder)
    return [f"{kind}:model={folder}", f"{kind}:model={folder},resize=clean"]


def _source(folder, size):
    file = folder / f"of_{size}.py"
    file.write_text(
        f"from torch.nn.functional import adaptive_avg_pool2d\n\n\n"
        f"def pooled(images):\n    return adaptive_avg_pool2d(images.float(), {size}).flatten(1)\n"
    )
    return file


def _inception(folder):
    from tests.eval.extractors import inception_weights

    return inception_weights.write(folder)


def _torchmetrics(scale):
    pytest.importorskip("torchmetrics")
    from genkit.eval.extractors.torchmetrics import TorchmetricsExtractor

    class Means(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(scale))

        def forward(self, images):
            return self.scale * images.float().mean((2, 3))

    return TorchmetricsExtractor(Means())


@pytest.fixture(scope="module", params=sorted(set(NAMES) - ELSEWHERE))
def built(request, tmp_path_factory):
    """The name of an extractor, and it with its usual and with other settings, as far as it has any."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    before = torch.get_rng_state()
    try:
        made = [get_extractor(one) for one in READY.get(name, lambda folder: [name])(folder)]
    except ValueError as error:
        pytest.fail(
            f"extractor {name!r} cannot be built by its name alone ({error}). Say in READY, above, how to build it "
            "with tiny random weights, and in SHAPES what images it takes if not RGB ones of any size"
        )
    if name not in READY:
        assert torch.equal(torch.get_rng_state(), before), "building it touched the global random state"
    return name, made


@pytest.fixture
def images(built):
    shape = SHAPES.get(built[0], SHAPE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_id_says_what_decides_features(built):
    name, made = built
    ids = [one.id for one in made]
    assert len(set(ids)) == len(ids), "another setting or weight, the same id"
    if name not in NO_NETWORK:
        assert all(re.search(r"[0-9a-f]{12}", one) for one in ids), f"{ids}: a hash of the weights belongs into the id"
    for extractor in made:
        rule = getattr(extractor, "resize", None)
        assert rule is None or f"/{rule}/" in extractor.id


def test_features_are_float32_and_do_not_depend_on_the_batch(built, images):
    name, (extractor, *_) = built
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    (whole,), parts = extract(extractor, [images]), list(extract(extractor, images.split([1, 2, 3])))
    assert whole.features.shape == (len(images), extractor.dim) and whole.features.dtype == torch.float32
    torch.testing.assert_close(torch.cat([out.features for out in parts]), whole.features, rtol=1e-4, atol=1e-4)
    if extractor.num_classes is None:
        assert whole.logits is None
    else:
        assert whole.logits.shape == (len(images), extractor.num_classes)
        torch.testing.assert_close(torch.cat([out.logits for out in parts]), whole.logits, rtol=1e-4, atol=1e-4)
    (again,) = extract(extractor, [images])
    assert torch.equal(again.features, whole.features)
    assert name in NO_NETWORK or (whole.features[0] - whole.features[1]).abs().max() > 1e-4
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()


def test_only_uint8_is_taken(built, images):
    name, (extractor, *_) = built
    if name not in NO_NETWORK:
        with pytest.raises(ValueError, match="uint8"):
            extractor(images.float() / 255)


def test_tables_name_no_extractor_that_is_gone():
    assert set(READY) | set(SHAPES) | NO_NETWORK | ELSEWHERE <= set(NAMES)
