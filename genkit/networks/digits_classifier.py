"""The classifier whose features measure generated digits."""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class DigitsClassifier(ModelMixin, ConfigMixin):
    """Class logits and features of 8x8 one-channel digits.

    Three 3x3 convolutions (8x8, 4x4, 4x4), whose last map is pooled to 2x2 and no further: that is the feature. It
    keeps stroke position and thickness. One layer later most of the variance is between classes: the Frechet distance
    of two random halves of the digits then mostly tells how their class counts happen to differ.

    Args:
        channels: width of the first convolution; the other two are twice as wide.
        hidden: width of the layer between features and logits.
        num_classes: number of logits.
        dropout: probability of zeroing a hidden activation, in training mode.
    """

    @register_to_config
    def __init__(self, channels: int = 16, hidden: int = 64, num_classes: int = 10, dropout: float = 0.3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.feature_dim = 8 * channels
        self.head = nn.Sequential(
            nn.Linear(self.feature_dim, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
        )

    def features(self, images: Tensor) -> Tensor:
        """``(B, 1, 8, 8)`` in [-1, 1] -> ``(B, 8 * channels)``, unnormalised."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 1, 8, 8)`` in [-1, 1] -> logits ``(B, num_classes)``."""
        return self.head(self.features(images))
