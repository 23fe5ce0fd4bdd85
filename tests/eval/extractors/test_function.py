import pytest
import torch

from genkit.eval.extractors.base import extract, function_extractor, get_extractor
from genkit.eval.extractors.function import FunctionExtractor
from genkit.eval.run import evaluate

SOURCE = """
import torch

factor = 2.0


def means(images):
    return images.float().mean((2, 3))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 5)
        torch.nn.init.constant_(self.head.weight, 0.5)
        torch.nn.init.zeros_(self.head.bias)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.head(means(images)))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def images(n, seed=0):
    return torch.randint(0, 256, (n, 3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_evaluations_take_functions_as_objects_and_by_path(file):
    sides = images(40), images(40, seed=1)
    own = function_extractor(lambda batch: batch.float().mean((2, 3)), 3, "means")
    wanted = evaluate(*sides, extractor=own, metrics=["frechet"], quiet=True)
    found = evaluate(*sides, extractor=f"function:path={file}:means,dim=3", metrics=["frechet"], quiet=True)
    assert found.values == wanted.values and found.values["frechet_distance"] > 0
    assert found.protocol.extractor.startswith("function-mine.py:means/no-resize/")


def test_a_module_is_made_once_frozen_and_out_of_training(file):
    before = torch.get_rng_state()
    extractor = FunctionExtractor(f"{file}:Network", dim=5)
    assert torch.equal(before, torch.get_rng_state())
    features = next(extract(extractor, [images(4)])).features
    assert torch.equal(features, next(extract(extractor, [images(4)])).features)
    torch.testing.assert_close(features[:, 0], 0.5 * images(4).float().mean((2, 3)).sum(1))


def test_the_id_follows_source_and_weights(file):
    ids = [FunctionExtractor(f"{file}:Network", dim=5).id for _ in range(2)]
    file.write_text(SOURCE.replace("factor = 2.0", "factor = 3.0"))
    ids.append(FunctionExtractor(f"{file}:Network", dim=5).id)
    assert ids[0] == ids[1] != ids[2]
    assert ids[0].rpartition("-")[2] == ids[2].rpartition("-")[2]  # the same weights
    assert get_extractor("function:path=torch.nn.functional:relu,dim=1").id.startswith("function-torch.nn.functional:")


def test_what_is_refused(file):
    with pytest.raises(ValueError, match="path=.*mine.py:factor is a float; accepted is what can be called"):
        FunctionExtractor(f"{file}:factor", dim=3)
    with pytest.raises(ValueError, match=r"returned \(2, 3\); expected a tensor \(2, 4\)"):
        FunctionExtractor(f"{file}:means", dim=4)(images(2))
    with pytest.raises(ValueError, match="there is no file absent.py"):
        FunctionExtractor("absent.py:means", dim=4)
    with pytest.raises(ValueError, match="extractor='function': accepted is 'function:path=..., dim=...'"):
        get_extractor("function")
    with pytest.raises(ValueError, match="dim='many': expected a number of features, at least 1"):
        get_extractor(f"function:path={file}:means,dim=many")
