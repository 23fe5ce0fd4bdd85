"""Which devices fused kernels are for, and who hears of ``choose``."""

import logging
import re
import threading
from types import SimpleNamespace

import numpy
import pytest
import torch

from genkit import kernels
from tests.needs import kernels_that_run

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(...)``: this machine has such a GPU, and kernels are compiled."""
    pytest.importorskip("triton")
    monkeypatch.delenv("GENKIT_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    kernels._log_once.cache_clear()

    def has(name, capability, shared, hip=None):
        major, minor = capability
        properties = SimpleNamespace(name=name, major=major, minor=minor, shared_memory_per_block_optin=shared * 1024)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    yield has
    kernels._log_once.cache_clear()


@pytest.mark.parametrize(
    "found", [("A100", (8, 0), 163), ("RTX 4090", (8, 9), 99), ("H100", (9, 0), 227), ("RTX 5090", (12, 0), 99)]
)
def test_kernels_are_for_ampere_and_later(gpu, found):
    gpu(*found)
    assert kernels.obstacle(GPU) is None and kernels.fused(GPU)
    with kernels.choose("off"):
        assert not kernels.fused(GPU)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (("Tesla T4", (7, 5), 64), r"Tesla T4 has compute capability 7.5, kernels need 8.0 \(Ampere\) or more; take a"),
        (("Some GPU", (8, 1), 64), "Some GPU gives a block 64 KiB of shared memory, kernels need 99; take another"),
        (("MI300X", (9, 4), 64, "6.4"), r"kernels are for NVIDIA GPUs, and this torch is for AMD's \(ROCm\); eager"),
    ],
)
def test_other_gpus_are_eager_and_said_once_or_refused(gpu, found, message, caplog):
    gpu(*found)
    with caplog.at_level(logging.WARNING, "genkit.kernels"):
        assert not kernels.fused(GPU) and not kernels.fused(GPU)
    (record,) = caplog.records
    assert re.search(message, record.getMessage())
    with kernels.choose("on"), pytest.raises(RuntimeError, match=f"{message}.*; or set GENKIT_KERNELS=off"):
        kernels.fused(GPU)


def test_a_gpu_that_is_not_there(gpu, monkeypatch):
    gpu("none", (9, 0), 227)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no NVIDIA GPU" in kernels.obstacle("cuda")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_devices_without_kernels(gpu, device):
    assert f"triton has no kernels for '{device}'" in kernels.obstacle(device)
    assert not kernels.fused(torch.device(device))


def test_interpreted_kernels_are_for_tensors_with_memory(monkeypatch):
    kernels_that_run()
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    assert kernels.obstacle("cpu") is None and "'meta'" in kernels.obstacle("meta")


def test_an_interpreter_that_this_numpy_broke(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    found = {}
    for versions in (("3.6.0", "2.4.0"), ("3.6.0", "2.3.5"), ("3.7.0", "2.4.0"), ("3.10.0", "2.10.0")):
        for module, version in zip((triton, numpy), versions, strict=True):
            monkeypatch.setattr(module, "__version__", version)
        kernels._without_interpreter.cache_clear()
        found[versions] = kernels.obstacle("cpu")
    kernels._without_interpreter.cache_clear()
    assert "3.6.0 interprets no loops with numpy 2.4.0; pip install 'numpy<2.4'" in found.pop(("3.6.0", "2.4.0"))
    assert set(found.values()) == {None}


def test_a_compiled_function_hears_of_the_choice_and_says_the_reason(monkeypatch, caplog):
    monkeypatch.delenv("GENKIT_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_without_triton", lambda: "triton is not installed here")
    kernels._log_once.cache_clear()

    def fn(x):
        return x + 1 if kernels.mode() == "off" else x - 2 if kernels.fused(GPU) else x - 1

    torch._dynamo.reset()
    compiled, zero = torch.compile(fn, backend="eager", fullgraph=True), torch.zeros(1)
    with caplog.at_level(logging.WARNING, "genkit.kernels"):
        assert compiled(zero) == -1
    with kernels.choose("off"):
        assert compiled(zero) == 1
    assert compiled(zero) == -1
    assert sum("not installed here" in record.getMessage() for record in caplog.records) == 1
    torch._dynamo.reset()


def test_the_choice_is_of_the_process_and_ends(monkeypatch):
    monkeypatch.setenv("GENKIT_KERNELS", "on")
    seen = []
    with kernels.choose("auto"):
        with pytest.raises(ZeroDivisionError), kernels.choose("off"):
            thread = threading.Thread(target=lambda: seen.append(kernels.mode()))
            thread.start()
            thread.join()
            raise ZeroDivisionError
        assert kernels.mode() == "auto"
    assert seen == ["off"] and kernels.mode() == "on"


def test_bad_settings(monkeypatch):
    with pytest.raises(ValueError, match="kernels='fast' is not known"), kernels.choose("fast"):
        pass
    monkeypatch.setenv("GENKIT_KERNELS", "fast")
    with pytest.raises(ValueError, match="GENKIT_KERNELS='fast' is not known"):
        kernels.mode()
