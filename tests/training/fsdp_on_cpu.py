"""``python -m genkit.training`` under FSDP on CPUs, for which accelerate has no FSDP: it is told that it has."""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from genkit.training.__main__ import main
from genkit.training.sharding import is_sharded
from genkit.training.trainer import Trainer

_init, _train = AcceleratorState.__init__, Trainer.train


def init(self, *args, fsdp_plugin=None, **settings):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None:
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = fsdp_plugin


def train(self):
    assert is_sharded(list(self.objective.parameters())), "the weights lie in no shards: this tests nothing"
    _train(self)


if __name__ == "__main__":
    AcceleratorState.__init__, Trainer.train = init, train
    sys.exit(main())
