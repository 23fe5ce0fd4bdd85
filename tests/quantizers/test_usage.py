import math

import pytest
import torch

from genkit.quantizers.usage import CodeUsage


def test_counts_add_up_over_batches():
    usage = CodeUsage(10)
    usage.update(torch.tensor([[0, 1], [1, 9]])).update(torch.tensor([1]))
    assert usage.counts.tolist() == [1, 3, 0, 0, 0, 0, 0, 0, 0, 1]
    p = (0.2, 0.6, 0.2)
    assert usage.usage == 0.3 and usage.perplexity == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))


def test_uniform_indices():
    usage = CodeUsage(64).update(torch.arange(640) % 64)
    assert usage.perplexity == pytest.approx(64) and usage.usage == 1


@pytest.mark.parametrize(("k", "expected"), [(16384, 0.9817), (65536, 0.632), (262144, 0.221)])
def test_what_a_window_can_show(k, expected):
    usage = CodeUsage(k).update(torch.randint(k, (65536,)))
    assert usage.expected == pytest.approx(expected, abs=5e-4)
    assert usage.usage == pytest.approx(expected, abs=0.01)


def test_a_window_of_as_many_tokens_as_codes_shows_little():
    """What is measured while training: 1 - 1/e, however well the codes are used."""
    usage = CodeUsage(16384).update(torch.randint(16384, (16385,)))
    assert usage.expected == pytest.approx(0.632, abs=5e-4) and usage.usage == pytest.approx(0.632, abs=0.02)


def test_alone_gathering_changes_nothing():
    usage = CodeUsage(4).update(torch.tensor([0, 3]))
    assert usage.gather().counts.tolist() == [1, 0, 0, 1] == usage.counts.tolist()


def test_bad_input():
    with pytest.raises(ValueError, match="codebook_size=0: expected at least 1"):
        CodeUsage(0)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="accepted are 0 to 3"):
            CodeUsage(4).update(torch.tensor([0, wrong]))
