"""The small runs of ``toys.py``, which is also a script and so no part of a package."""

import importlib.util
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _own_accelerator():
    """accelerate keeps one state a process; a test that changes the precision must not change it for the next."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def toys():
    spec = importlib.util.spec_from_file_location("training_toys", Path(__file__).with_name("toys.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
