"""Rewards behind one interface: a file a reward, found by its file's name."""

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
        ValueError: an unknown name; a setting that the reward's ``Config`` refuses.
    """
    reward = lookup("genkit.rewards", Reward, name, setting="reward")(**settings)
    return reward.requires_grad_(False).eval()
