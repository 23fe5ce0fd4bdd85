"""The Inception network of 2015, whose features the Frechet inception distance is defined on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = int | tuple[int, int]
Conv = tuple[str, int, Kernel] | tuple[str, int, Kernel, int]  # name, channels out, kernel, stride 1 if not given
Path = Sequence[str | Conv | list[Conv]]

# TensorFlow leaves padding out of an average. The maximum of the last block is a slip of the published graph.
_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Inception2015(nn.Module):
    """Inception v3 as in TensorFlow's graph of 2015-12-05: pooled features ``(B, 2048)`` and ``(B, 1008)`` logits.

    The names of its parameters are those of torchvision's ``inception_v3`` without auxiliary head, and of the published
    conversion of the weights. What differs from torchvision's is pooling, and 1008 outputs. The logits are without
    bias, as the Inception Score takes them.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567; weights and
    pooling of inception-2015-12-05.tgz.
    """

    feature_dim = 2048
    num_classes = 1008
    size = 299

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padding=0)
        self.Mixed_5b = _Mixed(192, _at_35(32))
        self.Mixed_5c = _Mixed(256, _at_35(64))
        self.Mixed_5d = _Mixed(288, _at_35(64))
        self.Mixed_6a = _Mixed(288, _TO_17)
        self.Mixed_6b = _Mixed(768, _at_17(128))
        self.Mixed_6c = _Mixed(768, _at_17(160))
        self.Mixed_6d = _Mixed(768, _at_17(160))
        self.Mixed_6e = _Mixed(768, _at_17(192))
        self.Mixed_7a = _Mixed(768, _TO_8)
        self.Mixed_7b = _Mixed(1280, _at_8("average"))
        self.Mixed_7c = _Mixed(2048, _at_8("maximum"))
        self.fc = nn.Linear(self.feature_dim, self.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 3, 299, 299)`` in [-1, 1] to features and logits."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = _POOLS["halve"](x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = _POOLS["halve"](x)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight)


class _Conv(nn.Module):
    """Convolution, normalisation, rectifier; ``padding`` keeps the size if not given."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: int | None = None):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        kept = (height // 2, width // 2) if padding is None else (padding, padding)
        self.conv = nn.Conv2d(channels, out, (height, width), stride, kept, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Paths side by side, their results stacked; a list within a path is a fork into several convolutions."""

    def __init__(self, channels: int, paths: Sequence[Path]):
        super().__init__()
        self.paths: list[list[str | list[str]]] = []
        for path in paths:
            steps: list[str | list[str]] = []
            width = channels
            for step in path:
                if isinstance(step, str):
                    steps.append(step)
                    continue
                convs = step if isinstance(step, list) else [step]
                for name, out, kernel, *stride in convs:
                    shrinks = {"stride": stride[0], "padding": 0} if stride else {}
                    self.add_module(name, _Conv(width, out, kernel, **shrinks))
                steps.append([name for name, *_ in convs])
                width = sum(conv[1] for conv in convs)
            self.paths.append(steps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._along(path, x) for path in self.paths], 1)

    def _along(self, path: Sequence[str | list[str]], x: Tensor) -> Tensor:
        for step in path:
            if isinstance(step, str):
                x = _POOLS[step](x)
            else:
                x = torch.cat([self.get_submodule(name)(x) for name in step], 1)
        return x


def _at_35(pooled: int) -> list[Path]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pooled, 1)],
    ]


_TO_17: list[Path] = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ["halve"],
]


def _at_17(inner: int) -> list[Path]:
    row, column = (1, 7), (7, 1)
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
        [
            ("branch7x7dbl_1", inner, 1),
            ("branch7x7dbl_2", inner, column),
            ("branch7x7dbl_3", inner, row),
            ("branch7x7dbl_4", inner, column),
            ("branch7x7dbl_5", 192, row),
        ],
        ["average", ("branch_pool", 192, 1)],
    ]


_TO_8: list[Path] = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ],
    ["halve"],
]


def _at_8(pool: str) -> list[Path]:
    row, column = (1, 3), (3, 1)
    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)],
        ],
        [pool, ("branch_pool", 192, 1)],
    ]
