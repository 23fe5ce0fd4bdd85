"""Flow maps as files: saved, loaded into a fresh pipeline, and what is wrong with a broken one."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from genkit import hub
from genkit.denoisers import TwoTime, from_pipeline
from genkit.testing import tiny
from tests.test_hub import class_conditional

NAMES = ("sd15", "sdxl", "sd3", "flux", "dit")


def student(pipe, *, lora=True, alpha=8, scalars=None):
    """A flow map off its teacher in every weight that is trained; and the same as a function."""
    from peft import LoraConfig, inject_adapter_in_model

    denoiser = from_pipeline(pipe)
    if lora:
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_v"])
        add = getattr(denoiser.inner, "add_adapter", None)
        add(config) if add else inject_adapter_in_model(config, denoiser.inner)
    flow_map = TwoTime(denoiser)
    flow_map.add_scalars(scalars or {})
    with torch.no_grad():
        for name, p in flow_map.module.named_parameters():
            if "lora_B" in name or ("gap_embedder" in name and "out" in name) or not lora:
                p.add_(torch.randn_like(p) * 0.05)
    return flow_map


def jump(flow_map, pipe, name):
    inputs = dict(class_labels=[3]) if name == "dit" else dict(prompt="a cat")
    if name in ("sd3", "flux"):
        inputs["max_sequence_length"] = 8
    condition = flow_map.encode(pipe, **inputs)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return flow_map.jump(x, torch.tensor(0.8), torch.tensor(0.1), condition)


@pytest.mark.parametrize("name", NAMES)
def test_flow_map_loads_into_a_fresh_pipeline(name, tiny_pipeline, tmp_path):
    pipe, fresh = tiny_pipeline(name), tiny_pipeline(name)
    teacher = jump(TwoTime(from_pipeline(tiny_pipeline(name))), fresh, name)
    flow_map = student(pipe)
    before = jump(flow_map, pipe, name)
    assert (before - teacher).abs().max() > 1e-3
    assert hub.save_flow_map(tmp_path, flow_map) == tmp_path
    assert {f.name for f in tmp_path.iterdir()} == {
        "flow_map_config.json",
        "gap_embedder.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    after = jump(hub.load_flow_map(fresh, tmp_path), fresh, name)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_what_a_student_embeds_comes_back(lora, tiny_pipeline, tmp_path):
    pipe, fresh = tiny_pipeline("sd3"), tiny_pipeline("sd3")
    flow_map = student(pipe, lora=lora, scalars={"guidance_scale": 5.0})
    hub.save_flow_map(tmp_path, flow_map)
    loaded = hub.load_flow_map(fresh, tmp_path)
    assert loaded.scalars == {"guidance_scale": 5.0}
    torch.testing.assert_close(jump(loaded, fresh, "sd3"), jump(flow_map, pipe, "sd3"), rtol=1e-5, atol=1e-5)
    flow_map.add_scalars({"guidance_scale": 2.0})
    assert (jump(loaded, fresh, "sd3") - jump(flow_map, pipe, "sd3")).abs().max() > 1e-4  # and it is told that


@pytest.mark.parametrize("name", ("sd15", "sdxl", "sd3", "flux"))
def test_the_lora_is_a_diffusers_file_that_keeps_alpha(name, tiny_pipeline, tmp_path):
    pipe, fresh = tiny_pipeline(name), tiny_pipeline(name)
    flow_map = student(pipe, alpha=16)
    hub.save_flow_map(tmp_path, flow_map)
    fresh.load_lora_weights(str(tmp_path))  # Diffusers' own
    network = fresh.unet if hasattr(fresh, "unet") else fresh.transformer
    assert network.peft_config["default_0"].lora_alpha == 16
    nn.init.zeros_(flow_map.network.gap_embedder.out.weight)
    torch.testing.assert_close(
        jump(TwoTime(from_pipeline(fresh)), fresh, name), jump(flow_map, pipe, name), rtol=1e-5, atol=1e-5
    )


def test_a_student_without_lora_saves_all_of_its_weights(tiny_pipeline, tmp_path):
    pipe, fresh = tiny_pipeline("sd3"), tiny_pipeline("sd3")
    flow_map = student(pipe, lora=False)
    hub.save_flow_map(tmp_path, flow_map)
    loaded = hub.load_flow_map(from_pipeline(fresh), tmp_path)  # a denoiser will do
    torch.testing.assert_close(jump(loaded, fresh, "sd3"), jump(flow_map, pipe, "sd3"), rtol=1e-5, atol=1e-5)


def test_several_loras_need_a_name(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sd3")
    flow_map = student(pipe)
    from peft import LoraConfig

    flow_map.denoiser.inner.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="other")
    with pytest.raises(ValueError, match=r"adapter_name=None: the network has the adapters \['default', 'other'\]"):
        hub.save_flow_map(tmp_path, flow_map)
    with pytest.raises(ValueError, match="adapter_name='none'"):
        hub.save_flow_map(tmp_path, flow_map, adapter_name="none")
    hub.save_flow_map(tmp_path, flow_map, adapter_name="other")
    assert all(".to_k." in key for key in load_file(tmp_path / "pytorch_lora_weights.safetensors"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    return hub.save_flow_map(folder, student(tiny.pipeline("sd3")))


def broken(saved, tmp_path, file, change) -> Path:
    for source in saved.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    change(tmp_path / file)
    return tmp_path


@pytest.mark.parametrize("file", ["gap_embedder.safetensors", "pytorch_lora_weights.safetensors"])
def test_truncated_weights(file, saved, tmp_path, tiny_pipeline):
    folder = broken(saved, tmp_path, file, lambda f: f.write_bytes(f.read_bytes()[:-100]))
    with pytest.raises(ValueError, match=f"{file} is truncated or no safetensors file"):
        hub.load_flow_map(tiny_pipeline("sd3"), folder)


@pytest.mark.parametrize(
    "file", ["flow_map_config.json", "gap_embedder.safetensors", "pytorch_lora_weights.safetensors"]
)
def test_missing_file(file, saved, tmp_path, tiny_pipeline):
    folder = broken(saved, tmp_path, file, Path.unlink)
    with pytest.raises(FileNotFoundError, match=f"{file} is missing; found "):
        hub.load_flow_map(tiny_pipeline("sd3"), folder)


def edited(**changes):
    def change(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(network_class="UNet2DConditionModel"), "network_class is 'UNet2DConditionModel', wanted 'SD3Transformer"),
        (dict(prediction_type="epsilon"), "prediction_type is 'epsilon', wanted 'flow_prediction'"),
        (dict(interpolant="DiscreteVP"), "interpolant is 'DiscreteVP', wanted 'Linear'"),
        (dict(gap_embedder=dict(width=3)), "gap_embedder is {'width': 3}"),
        (dict(gap_embedder=dict(dim=8)), "another GapEmbedder: 2 tensors differ, the first is 'hidden.weight'"),
    ],
)
def test_foreign_configuration(changes, message, saved, tmp_path, tiny_pipeline):
    folder = broken(saved, tmp_path, "flow_map_config.json", edited(**changes))
    with pytest.raises(ValueError, match=message):
        hub.load_flow_map(tiny_pipeline("sd3"), folder)


def test_foreign_student_and_broken_json(saved, tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match="network_class is 'SD3Transformer2DModel', wanted 'UNet2DConditionModel'"):
        hub.load_flow_map(tiny_pipeline("sd15"), saved)
    folder = broken(saved, tmp_path, "flow_map_config.json", lambda f: f.write_text(f.read_text()[:40]))
    with pytest.raises(ValueError, match="flow_map_config.json is truncated or no JSON file"):
        hub.load_flow_map(tiny_pipeline("sd3"), folder)


def renamed(before, after, shape=None):
    def change(file):
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        tensors = {key.replace(before, after): value for key, value in load_file(file).items()}
        if shape:
            tensors = {k: torch.zeros(shape) if "lora_A" in k else v for k, v in tensors.items()}
        save_file(tensors, file, metadata=header)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (renamed("transformer.", "unet."), r"found \['unet\..*wanted keys that begin with 'transformer\.'"),
        (renamed("transformer_blocks", "blocks"), "but SD3Transformer2DModel has no layer blocks.0.attn.to_q"),
        (renamed("", "", shape=(4, 7)), r"of shape \(4, 7\), wanted 32 inputs"),
        (lambda f: save_file(load_file(f), f), "lora_alpha is unknown"),
    ],
)
def test_foreign_lora(change, message, saved, tmp_path, tiny_pipeline):
    pipe = tiny_pipeline("sd3")
    folder = broken(saved, tmp_path, "pytorch_lora_weights.safetensors", change)
    with pytest.raises(ValueError, match=message):
        hub.load_flow_map(pipe, folder)
    assert not hasattr(pipe.transformer, "peft_config")  # refused before anything was changed


def test_a_network_of_two_times_is_no_teacher(saved):
    with pytest.raises(ValueError, match="target=ClassConditionalPipeline holds a network of two times"):
        hub.load_flow_map(class_conditional(FlowMatchEulerDiscreteScheduler()), saved)


def test_no_such_folder(tiny_pipeline):
    with pytest.raises(FileNotFoundError, match="/no/such/place is neither a folder nor a repository id"):
        hub.load_flow_map(tiny_pipeline("sd3"), "/no/such/place")
    with pytest.raises(FileNotFoundError, match="somebody/something is no folder here, and the Hub did not give"):
        hub.load_flow_map(tiny_pipeline("sd3"), "somebody/something")


def test_a_full_disk_leaves_the_previous_student_whole(saved, tmp_path, tiny_pipeline, monkeypatch):
    folder = broken(saved, tmp_path, "flow_map_config.json", lambda f: None)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genkit._flow_map_files.save_lora_weights", full)
    with pytest.raises(OSError, match="No space left"):
        hub.save_flow_map(folder, student(tiny_pipeline("sd3")))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
