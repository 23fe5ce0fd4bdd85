"""Rewards behind one interface: a file a reward, found by its file's name."""

from genkit._files import first_line
from genkit.registry import lookup, member_class, members
from genkit.rewards.base import Reward

__all__ = ["Reward", "make", "names"]


def __getattr__(name: str):
    return member_class(__name__, Reward, name)


def names() -> list[str]:
    """Names of the rewards."""
    return sorted(members("genkit.rewards", Reward))


def make(name: str, **settings) -> Reward:
    """The reward called ``name`` with its ``settings``, frozen and in eval mode.

    Raises:
        ValueError: an unknown name; a setting that the reward's ``Config`` refuses; weights that are neither here nor
            given by the Hub.
    """
    cls = lookup("genkit.rewards", Reward, name, setting="reward")
    try:
        reward = cls(**settings)
    except OSError as error:
        config = cls.Config(**settings).model_dump()
        where = ", ".join(f"{key}={config[key]!r}" for key in ("model", "head", "tokenizer") if key in config)
        raise ValueError(
            f"reward={name!r} with {where or settings} could not be loaded: {first_line(error)}; accepted are folders "
            "here and names (owner/name) on the Hub"
        ) from error
    return reward.requires_grad_(False).eval()
