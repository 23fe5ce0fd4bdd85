import pytest
import torch
from torch.nn import functional as F

from genkit.networks.inception import Inception2015
from tests.eval.extractors import inception_weights


@pytest.fixture(scope="module")
def state():
    return inception_weights.state()


@pytest.fixture(scope="module")
def network(state):
    network = Inception2015().eval()
    network.load_state_dict(state)
    return network


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # of arguments that torchvision would have otherwise now
@torch.no_grad()
def test_pytorch_fid_gives_the_same_features(network, state, images, monkeypatch):
    # clean-fid carries pytorch-fid's network; it would download the weights.
    theirs = pytest.importorskip("cleanfid.inception_pytorch")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: state)
    oracle = theirs.InceptionV3(resize_input=False, normalize_input=False).eval()
    features, _ = network(images)
    torch.testing.assert_close(features, oracle(images)[0].flatten(1), rtol=1e-5, atol=1e-5)
    assert features.std() > 1e-2  # the random weights leave something to compare


@torch.no_grad()
def test_torchvision_gives_the_same_but_for_pooling(network, state, images, monkeypatch):
    torchvision = pytest.importorskip("torchvision.models")
    oracle = torchvision.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    assert oracle.state_dict().keys() == network.state_dict().keys()
    oracle.load_state_dict(state)
    features, logits = network(images)
    bias = state["fc.bias"]
    assert not torch.allclose(oracle(images), logits + bias, rtol=1e-2, atol=1e-2)
    average = F.avg_pool2d

    def pool(x, kernel_size, stride, padding):
        if x.shape[1] == 2048:  # the last block
            return F.max_pool2d(x, kernel_size, stride, padding)
        return average(x, kernel_size, stride, padding, count_include_pad=False)

    monkeypatch.setattr(F, "avg_pool2d", pool)
    wanted = oracle(images)
    monkeypatch.undo()
    torch.testing.assert_close(logits + bias, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    torch.testing.assert_close(logits, features @ state["fc.weight"].T)  # no bias in what the Inception Score takes


def test_sizes(network):
    assert sum(p.numel() for p in network.parameters()) == 21_785_568 + 1008 * 2049  # as torchvision, with another head
    assert (network.feature_dim, network.num_classes, network.size) == (2048, 1008, 299)
