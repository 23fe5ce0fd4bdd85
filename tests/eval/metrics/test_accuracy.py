import pytest
import torch

from genkit.eval.metrics.accuracy import class_accuracy


def test_share_of_right_classes():
    logits = torch.eye(4).repeat(2, 1)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0])
    assert class_accuracy(logits, labels) == 7 / 8


def test_errors():
    with pytest.raises(ValueError, match=r"labels are 0..4, but the classifier knows 0..3"):
        class_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="labels are -1"):
        class_accuracy(torch.eye(4), torch.tensor([0, 1, 2, -1]))
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(3,\)"):
        class_accuracy(torch.eye(4), torch.tensor([0, 1, 2]))
