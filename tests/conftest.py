"""Set before anything is imported: no test may reach for the network, and none may depend on another's random state."""

import copy
import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import random

import numpy
import pytest
import torch

if not torch.cuda.is_available():  # Triton asks when a kernel is defined: without a GPU kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

# The tests' tensors are small: more threads would only wait for each other, and could change the order of sums.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_pipeline():
    """``tiny_pipeline(name)``: a quiet tiny pipeline that the test may mutate (built once, then copied)."""
    import diffusers.utils.logging
    import transformers.utils.logging

    from genkit.testing import tiny

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    built = {}

    def get(name: str):
        if name not in built:
            built[name] = tiny.pipeline(name)
            built[name].set_progress_bar_config(disable=True)
        return copy.deepcopy(built[name])

    return get
