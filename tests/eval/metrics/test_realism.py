import math

import pytest
import torch

from genkit.eval.extractors.base import function_extractor
from genkit.eval.inputs import read_images
from genkit.eval.metrics.prdc import prdc
from genkit.eval.metrics.realism import Realism, realism
from genkit.eval.run import measure


def test_by_hand():
    # On a line, k=1: radii 1, 1, 2, 5. The median counts two below and itself, 1, so 3 and 8 are left out.
    x = torch.tensor([[0.0], [1.0], [3.0], [8.0]])
    y = torch.tensor([[0.5], [-4.0], [1.25], [3.0], [1.0]])
    assert realism(x, y, k=1).tolist() == pytest.approx([2, 0.25, 4, 0.5, math.inf], rel=1e-15)
    # k=2: radii 3, 2, 3, 7: of the first three 0 reaches 0.5 by 3/0.5, and 1 reaches it by 2/0.5.
    assert realism(x, y, k=2).tolist() == pytest.approx([6, 0.75, 8, math.inf, math.inf], rel=1e-15)


def test_blocks_and_precision():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=g, dtype=torch.float64), 1.5 * torch.randn(50, 4, generator=g).double()
    whole = realism(x, y)
    assert torch.equal(realism(x, y, block=7), whole)
    radii = torch.stack([torch.stack([(a - b).norm() for b in x]).sort().values[3] for a in x])
    dense = radii <= radii.sort().values[len(x) // 2 - 1]
    want = torch.stack([max(r / (a - b).norm() for a, r in zip(x[dense], radii[dense], strict=True)) for b in y])
    torch.testing.assert_close(whole, want, rtol=1e-12, atol=0)
    assert (whole >= 1).double().mean() <= prdc(x, y).precision < 1  # the balls of precision include the large ones


def test_copies_of_duplicates_are_on_the_edge():
    x = torch.tensor([[0.0]] * 4 + [[9.0]])
    assert realism(x, torch.tensor([[0.0], [1.0]])).tolist() == [1.0, 0.0]


def test_a_large_reference_is_thinned_evenly():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (30, 1, 2, 2), generator=g, dtype=torch.uint8)
    extractor = function_extractor(lambda images: images.flatten(1).float(), 4, "pixels")
    reference, generated = (measure(read_images(s), extractor, quiet=True) for s in (x, x[:9].flip(-1)))
    made = Realism(most=10)(reference, generated)["realism"]
    assert made == pytest.approx(realism(reference.features[::3], generated.features).mean().item(), rel=1e-12)
    assert Realism(most=30)(reference, generated) != Realism(most=10)(reference, generated)
    assert Realism(most=10).settings == {"k": 3, "most": 10}


def test_errors():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="k=0"):
        realism(x, x, k=0)
    with pytest.raises(ValueError, match="reference set: 3 features, but realism with k=3 needs at least 4"):
        realism(x, x)
    with pytest.raises(ValueError, match="most=3: expected more than k=3"):
        Realism(most=3)
