"""Two processes that train one codebook are one process with their vectors together."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from genkit.quantizers import make, processes
from genkit.quantizers.usage import CodeUsage

CASES = {
    "ema": ("vq", dict(rule="ema", decay=0.7, init="normal")),
    "k-means": ("vq", dict(rule="ema", kmeans_init=True)),
    "restart": ("vq", dict(rule="ema", restart_threshold=2.0, decay=0.7)),
    "restart of most": ("vq", dict(rule="ema", restart_threshold=30.0, decay=0.7, codebook_size=64)),
    "restart by gradient": ("vq", dict(restart_threshold=1.0)),
    "entropy": ("vq", dict(init="normal", entropy_weight=0.5, entropy_tau=0.8)),
    "bits": ("lfq", dict(entropy_weight=0.5, entropy_tau=0.8, batch_entropy="bits")),
    "joint": ("lfq", dict(entropy_weight=0.5, entropy_tau=0.8)),
    "ibq": ("ibq", dict(entropy_weight=0.5, entropy_tau=0.8)),
    "fvq": ("fvq", dict(start="spread", num_heads=1)),
}


class Model(nn.Module):
    def __init__(self, kind, settings):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.arange(12.0).view(4, 3).sin())
            self.encoder.bias.zero_()
        self.quantizer = make(kind, dim=4, **({} if kind == "lfq" else {"codebook_size": 16}) | settings)
        self.double()

    def forward(self, x):
        found = self.quantizer(self.encoder(x))
        return (found.z_q - 1).square().mean() + sum(found.losses.values()), found.indices


def train(model, batches, call=None):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    usage = CodeUsage(model.quantizer.codebook_size)
    for x in batches:
        loss, indices = (call or model)(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        usage.update(indices)
    return {k: v.clone() for k, v in model.state_dict().items()} | {"usage": usage.gather().counts}


def _one_of_two(rank, file, batches, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    for name, (kind, settings) in CASES.items():
        model = Model(kind, settings)
        own = batches[:, rank]
        found[name] = train(model, own, nn.parallel.DistributedDataParallel(model))
    found["rows"] = processes.all_rows(torch.arange(6.0).view(3, 2)[: rank + 1] + 10 * rank)
    results[rank] = {
        k: {n: v.tolist() for n, v in s.items()} if isinstance(s, dict) else s.tolist() for k, s in found.items()
    }
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    generator = torch.Generator().manual_seed(3)
    batches = torch.randn(4, 2, 1, 24, 3, generator=generator, dtype=torch.float64)
    with mp.Manager() as manager:
        results = manager.dict()
        file = tmp_path_factory.mktemp("processes") / "sync"
        mp.start_processes(_one_of_two, (file, batches, results), nprocs=2, start_method="fork")
        return batches, dict(results)


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(name, both):
    batches, results = both
    assert results[0][name] == results[1][name], "replicas differ"
    kind, settings = CASES[name]
    alone = train(Model(kind, settings), batches.flatten(1, 2))
    for key, value in alone.items():
        found = torch.tensor(results[0][name][key], dtype=value.dtype)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
    assert alone["usage"].sum() == 4 * 48 and (alone["usage"] > 0).sum() > 1


def test_rows_that_differ_in_number(both):
    rows = both[1]
    assert rows[0]["rows"] == rows[1]["rows"] == [[0, 1], [10, 11], [12, 13]]


def test_counts_on_a_cpu_are_sent_from_the_gpu_where_the_backend_knows_gpus_alone(monkeypatch):
    moved = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(2))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: moved.append(self) or self.clone())
    for backend, sent in (("gloo", 0), ("nccl", 1)):
        monkeypatch.setattr(dist, "get_backend", lambda backend=backend: backend)
        usage = CodeUsage(3).update(torch.tensor([0, 2, 2]))
        assert usage.gather().counts.tolist() == [2, 0, 4] and usage.counts.tolist() == [1, 0, 2]
        assert len(moved) == sent
