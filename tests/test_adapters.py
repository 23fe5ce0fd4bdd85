"""Mixtures of LoRAs: the sum of their updates, in Diffusers, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from genkit._flow_map_files import LORA_NAME, save_lora_weights
from genkit.adapters import mix_adapters, parse_adapter
from genkit.cli import app
from genkit.testing import tiny


def network(pipe):
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def adapter(folder, kind="sd15", seed=0, dtype=torch.float32, **settings):
    """A LoRA with random weights of a tiny model's network, saved as training does."""
    net = network(tiny.pipeline(kind)).to(dtype)
    net.add_adapter(LoraConfig(**dict(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]) | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    save_lora_weights(folder, net, "default")
    return folder


def updates(pipe):
    """What the loaded LoRA adds to every weight, in float64."""
    found = {}
    for name, module in network(pipe).named_modules():
        if hasattr(module, "lora_A") and module.active_adapters:
            (active,) = module.active_adapters
            down, up = (getattr(module, k)[active].weight.double() for k in ("lora_A", "lora_B"))
            found[name] = module.scaling[active] * (up.flatten(1) @ down.flatten(1))
    return found


def loaded(folder, kind="sd15"):
    pipe = tiny.pipeline(kind)
    pipe.load_lora_weights(folder)
    return pipe


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_a_mixture_is_the_sum_of_updates(kind, tmp_path):
    """Of other ranks, alphas and layers, some convolutions; as Diffusers loads it."""
    a = adapter(tmp_path / "a", kind, r=3, lora_alpha=5, alpha_pattern={"to_v": 2}, target_modules=["to_q", "to_v"])
    more = ["to_q", "to_k", "conv1"] if kind in ("sd15", "sdxl") else ["to_q", "to_k"]
    b = adapter(tmp_path / "b", kind, seed=1, r=2, use_rslora=True, target_modules=more)
    mixed = mix_adapters([(a, 0.7), (b, -0.3)], tmp_path / "mix", scale=0.5)
    parts = [updates(loaded(folder, kind)) for folder in (a, b)]
    got = updates(loaded(mixed, kind))
    assert set(got) == set(parts[0]) | set(parts[1]) and set(parts[0]) - set(parts[1])
    for name, update in got.items():
        expected = sum(0.5 * w * p[name] for w, p in zip((0.7, -0.3), parts, strict=True) if name in p)
        assert (update - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    record = json.loads((mixed / "mix.json").read_text())
    assert record == {"adapters": [{"path": str(a), "weight": 0.7}, {"path": str(b), "weight": -0.3}], "scale": 0.5}


def test_in_float64_the_sum_is_exact(tmp_path):
    """And linear: no products of one adapter's A with another's B."""
    folders = [adapter(tmp_path / str(i), seed=i, dtype=torch.float64, lora_alpha=3 + i) for i in range(2)]
    mixed = load_file(mix_adapters(list(zip(folders, (0.7, 0.3), strict=True)), tmp_path / "mix") / LORA_NAME)
    files = [load_file(folder / LORA_NAME) for folder in folders]
    downs = [key for key in mixed if "lora_A" in key]
    assert downs
    for key in downs:
        up = key.replace("lora_A", "lora_B")
        expected = sum(
            w * (3 + i) / 2 * (f[up] @ f[key]) for i, (w, f) in enumerate(zip((0.7, 0.3), files, strict=True))
        )
        assert mixed[key].dtype == torch.float64
        assert torch.allclose(mixed[up] @ mixed[key], expected, rtol=1e-14, atol=1e-15)


def images(pipe, kind="sd15"):
    return torch.from_numpy(pipe(**tiny.call_arguments(kind)).images)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_scale_zero_is_the_base_bit_for_bit_and_one_the_adapter(kind, tmp_path):
    a = adapter(tmp_path / "a", kind)
    base, tuned = images(tiny.pipeline(kind), kind), images(loaded(a, kind), kind)
    assert not torch.equal(base, tuned)
    assert torch.equal(images(loaded(mix_adapters([(a, 1)], tmp_path / "zero", scale=0), kind), kind), base)
    assert torch.equal(images(loaded(mix_adapters([(a, 0), (a, 0)], tmp_path / "zeros"), kind), kind), base)
    one = images(loaded(mix_adapters([(a, 1)], tmp_path / "one"), kind), kind)
    assert torch.allclose(one, tuned, atol=1e-5)


def test_a_file_without_metadata_has_scale_one(tmp_path):
    """As Diffusers' own scripts write it, and reads it."""
    a = adapter(tmp_path / "a")
    older = {"lora_A": "lora.down", "lora_B": "lora.up"}
    tensors = {k.replace(side := k.split(".")[-2], older[side]): v for k, v in load_file(a / LORA_NAME).items()}
    save_file(tensors, a / LORA_NAME, {"format": "pt"})
    mixed = updates(loaded(mix_adapters([(a / LORA_NAME, 2.0)], tmp_path / "mix")))
    plain = updates(loaded(a))
    assert (
        all(torch.allclose(mixed[k], 2 * plain[k], rtol=1e-6, atol=1e-8) for k in mixed)
        and mixed.keys() == plain.keys()
    )


def test_convolutions_and_attention_are_loaded_alike(tmp_path):
    """A file with names of two kinds would be read by half."""
    pipe = loaded(adapter(tmp_path / "a", target_modules=["to_q", "to_out.0", "conv1"]))
    ends = {name.rpartition(".")[2] for name in updates(pipe)}
    assert ends == {"to_q", "0", "conv1"}


def test_command(tmp_path):
    a, b = (adapter(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    arguments = ["adapters", "mix", f"{a}=0.7", str(b), "--output", str(tmp_path / "mix"), "--scale", "0.5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "mix/mix.json").read_text())["adapters"][1] == {"path": str(b), "weight": 1.0}
    assert parse_adapter("a=b=0.5") == ("a=b", 0.5)
    with pytest.raises(ValueError, match="adapter 'a=b': 'b' is no number; accepted is FOLDER=0.7"):
        parse_adapter("a=b")


def test_bad_input(tmp_path):
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "sd3", "sd3")
    output = tmp_path / "mix"

    def refused(text, *adapters, error=ValueError, to=output, **settings):
        with pytest.raises(error, match=text):
            mix_adapters([(path, 1.0) for path in adapters], to, **settings)
        assert not output.exists()

    refused("at least one")
    refused(r"is of \['unet'\], .* of \['transformer'\]: different networks", a, b)
    refused(
        "nowhere is no file; wanted a folder with a pytorch_lora_weights", tmp_path / "nowhere", error=FileNotFoundError
    )
    refused("scale=nan: accepted is a finite number", a, scale=float("nan"))
    refused("a' is not empty; choose another folder", a, to=a)

    def changed(name, change, metadata=None):
        tensors = load_file(a / LORA_NAME)
        change(tensors)
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / LORA_NAME, metadata)
        return tmp_path / name

    key = next(k for k in load_file(a / LORA_NAME) if "lora_A" in k)
    wide = changed("wide", lambda t: t.update({key: torch.zeros(2, 99)}))
    refused(r"outputs and inputs \(\d+,\) in .*\(99,\) in .*: adapters of different networks", a, wide)
    refused("without the down matrix", changed("half", lambda t: t.pop(key)))
    refused("has ranks 3 and 2 in its two matrices", changed("ranks", lambda t: t.update({key: torch.zeros(3, 8)})))
    refused(
        "found 'unet.x.alpha'; accepted are the matrices",
        changed("alpha", lambda t: t.update({"unet.x.alpha": torch.ones(())})),
    )
    refused("holds no tensors", changed("empty", lambda t: t.clear()))
    dora = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})}
    refused("a DoRA normalises its weights", changed("dora", lambda t: None, dora))
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow/flow_map_config.json").write_text("{}")
    refused("holds a flow map", tmp_path / "flow")
