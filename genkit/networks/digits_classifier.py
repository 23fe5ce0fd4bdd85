"""The classifier whose features measure generated digits."""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class DigitsClassifier(ModelMixin, ConfigMixin):
    """Class logits and features of 8x8 one-channel digits.

    Three 3x3 convolutions (8x8, 4x4, 4x4), pooled to 2x2 and never further: stroke position and thickness then reach
    the features, which a globally pooled classifier would collapse towards one point a class. The feature is the
    penultimate activation, the vector of which the logits are a linear function.

    Args:
        channels: width of the first convolution; the other two are twice as wide.
        feature_dim: d, the size of a feature.
        num_classes: number of logits.
        dropout: probability of zeroing a feature on the way to the logits, in training mode.
    """

    @register_to_config
    def __init__(self, channels: int = 16, feature_dim: int = 64, num_classes: int = 10, dropout: float = 0.3):
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
            nn.Linear(8 * channels, feature_dim),
            nn.SiLU(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(feature_dim, num_classes))

    def features(self, images: Tensor) -> Tensor:
        """``(B, 1, 8, 8)`` in [-1, 1] -> ``(B, feature_dim)``, unnormalised."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 1, 8, 8)`` in [-1, 1] -> logits ``(B, num_classes)``."""
        return self.head(self.features(images))
