import logging

import pytest

from genkit.attention import backends, sdpa


@pytest.fixture
def ours(monkeypatch):
    """Arguments of every call of our attention."""
    calls = []
    real = sdpa.attention

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(sdpa, "attention", counted)
    return calls


@pytest.fixture
def said(caplog):
    backends._say.cache_clear()
    caplog.set_level(logging.INFO, logger="genkit.attention")
    return caplog
