"""What ``auto`` takes on which device, and what is said of it."""

import pytest
import torch

from genkit import kernels
from genkit.attention import attention_coverage, backends, use
from tests.attention._networks import build


def test_auto_on_a_cpu(tiny_pipeline, said):
    net = build("dit", tiny_pipeline)
    for tangent, expected in ((False, "native"), (True, "genkit"), (True, "genkit")):
        with use(net.module, tangent=tangent) as chosen:
            assert chosen.backend == {"": expected}
    logged = [record.getMessage() for record in said.records]
    assert logged == [
        "attention of DiTTransformer2DModel: auto takes 'native', where PyTorch chooses among its kernels",
        "attention of DiTTransformer2DModel: auto takes 'genkit', which carries tangents, and is eager here",
    ]


@pytest.mark.parametrize(
    ("faults", "deterministic", "name", "reason"),
    [
        ({}, False, "_native_cudnn", "the fastest"),
        ({}, True, "native", "not known to be deterministic"),
        ({True: "no masks"}, False, "native", "left out (no masks)"),
    ],
)
def test_auto_on_a_hopper(monkeypatch, faults, deterministic, name, reason):
    backends._fastest.cache_clear()
    monkeypatch.setattr(kernels, "obstacle", lambda device: "no GPU is here")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "problem", lambda *args, masked=False, **kwargs: faults.get(masked))
    sizes = (backends.Size(torch.device("cuda", 0), torch.bfloat16, 64),)
    chosen, why = backends._fastest(sizes, False, False, "auto", deterministic)
    assert chosen == name and reason in why
    assert backends._fastest(sizes, True, False, "auto", deterministic)[0] == "genkit"
    backends._fastest.cache_clear()


def test_eager_attention_on_a_gpu_is_said(monkeypatch, said, tiny_pipeline):
    size = backends.Size(torch.device("cuda", 0), torch.bfloat16, 64)
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 227 * 1024)
    records = attention_coverage(build("dit", tiny_pipeline).module)
    monkeypatch.setattr(kernels, "obstacle", lambda kind: "triton is not installed: pip install triton")
    backends._warn("net", "genkit", (size,), records)
    monkeypatch.setattr(kernels, "obstacle", lambda kind: None)
    backends._warn("net", "genkit", (size,), records)
    for unfit in (dict(channels=12), dict(channels=20, assumed=True), dict(dtype=torch.float64)):
        backends._warn("net", "genkit", (size._replace(**unfit),), records)
    logged = [record.getMessage() for record in said.records if record.name == "genkit.attention"]
    says = ["pip install triton", "12 channels a head in", r"20 channels a head (assumed) in", "in torch.float64"]
    assert len(logged) == 4 and all(part in line for part, line in zip(says, logged, strict=True))


@pytest.mark.parametrize(
    ("unfit", "word"),
    [
        ({}, "fused"),
        (dict(channels=20), "eager"),
        (dict(dtype=torch.float64), "eager"),
        (dict(dtype=torch.float32, channels=160), "fused"),
        (dict(dtype=torch.float32, channels=256), "eager"),
    ],
)
def test_auto_says_fused_only_where_a_kernel_computes(monkeypatch, unfit, word):
    monkeypatch.setattr(kernels, "obstacle", lambda device: None)
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 99 * 1024)
    backends._fastest.cache_clear()
    size = backends.Size(torch.device("cuda", 0), torch.bfloat16, 64)
    for sizes in ((size._replace(**unfit),), (size, size._replace(**unfit))):
        assert backends._fastest(sizes, True, False, "auto", False)[1].endswith(f"and is {word} here")
    backends._fastest.cache_clear()


def test_auto_does_not_take_cudnn_on_consumers_blackwell(monkeypatch):
    monkeypatch.setattr(backends, "problem", lambda *args, **kwargs: None)
    sizes = (backends.Size(torch.device("cuda", 0), torch.bfloat16, 64),)
    for capability, name in (((12, 0), "native"), ((10, 0), "_native_cudnn")):
        backends._fastest.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert backends._fastest(sizes, False, False, "auto", False)[0] == name
    backends._fastest.cache_clear()
