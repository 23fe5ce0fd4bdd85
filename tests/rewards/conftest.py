"""Every reward, made as users make it; what some need for that is in ``ready.py``."""

import pytest

from genkit.rewards import make
from tests.rewards import ready


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> dict[str, dict]:
    """``{name: settings}``, where a reward needs any."""
    return ready.settings(tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def reward(settings):
    """``reward(name, **more)``."""

    def get(name, **more):
        try:
            return make(name, **settings.get(name, {}) | more)
        except Exception as error:
            if name in settings or more:
                raise
            message = f"reward {name} is not made without settings; tell tests/rewards/ready.py, settings(): {error}"
            raise AssertionError(message) from error

    return get
