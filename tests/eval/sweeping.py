"""A tiny model to sweep over, and how processes are made that evaluate together."""

import os
import socket

import torch
import torch.multiprocessing as mp
from diffusers import FlowMatchEulerDiscreteScheduler

from genkit.networks.dit import DiT
from genkit.pipelines import ClassConditionalPipeline


def save_model(folder):
    """A class-conditional pipeline whose digits answer to label and guidance."""
    torch.manual_seed(0)
    network = DiT(sample_size=8, in_channels=1, patch_size=4, hidden_size=16, num_layers=1, num_heads=2, num_classes=10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ClassConditionalPipeline(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


def _launched(rank, count, port, function, arguments):
    from accelerate import PartialState

    # A product of matrices hangs on the number of threads in its last bits, and accelerate would choose another one.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()})
    PartialState._reset_state()  # the parent's
    function(rank, *arguments)
    if count > 1:
        PartialState().destroy_process_group()


def launch(count, function, *arguments):
    """``function(rank, *arguments)`` on ``count`` processes that are told of each other as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_launched, (count, port, function, arguments), nprocs=count, start_method="fork")
