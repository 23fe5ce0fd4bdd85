"""What some tests cannot do without."""

import pytest
import torch

from genkit import kernels


def kernels_that_run() -> None:
    """Skip where Triton is absent, or neither compiles for what is here nor interprets, with the reason."""
    reason = kernels.obstacle("cuda" if torch.cuda.is_available() else "cpu")
    if reason is not None:
        pytest.skip(reason)
