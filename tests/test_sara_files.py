"""SaRAs in files: they come back exactly, add up, and are refused on another base model."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from genkit.adapters import fused, mix_adapters
from genkit.sara import add_sara, merge_sara, sara_layers
from genkit.sara_files import SARA_NAME, Applied, SparseAdapter, load_sara, mixed

SHAPES = dict(atol=1e-6, rtol=0)


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32)).to(dtype)


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))


def tuned(seed=0, threshold=0.05, dtype=torch.float32, **settings):
    """A network with a SaRA whose changes are random."""
    network = mlp(dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for sara in add_sara(network, threshold=threshold, **settings).values():
            sara.delta.copy_(0.1 * torch.randn(len(sara.delta), generator=generator))
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_loaded_and_merged_is_the_live_model(dtype, tmp_path):
    live, x = tuned(dtype=dtype), X.to(dtype)
    expected = live(x).detach()
    folder = SparseAdapter.of(live).save(tmp_path / "a")
    other = mlp(dtype=dtype)
    before = other(x).detach()
    applied = load_sara(other, folder)
    assert torch.equal(other(x), expected) and not torch.equal(expected, before)
    assert torch.equal(fused(live)(x), expected) and sara_layers(live)  # a copy: the live one is as it was
    merge_sara(live)
    assert torch.equal(live(x), expected)
    assert all(torch.equal(p, live.state_dict()[n]) for n, p in other.state_dict().items())
    applied.undo()
    assert torch.equal(other(x), before)
    with safe_open(folder / SARA_NAME, "pt") as file:
        assert set(file.keys()) == {f"transformer.{i}.weight.{k}" for i in (0, 2) for k in ("index", "delta")}
        base = json.loads(file.metadata()["sara"])["base"]
    assert base["0.weight"]["shape"] == [48, 32] and len(base["0.weight"]["sha256"]["float32"]) == 16


def test_merging_equals_the_adapter_s_output_in_double_precision(tmp_path):
    network = mlp(dtype=torch.float64)
    with torch.no_grad():
        for sara in add_sara(network, threshold=0.05).values():
            sara.delta.normal_()
    folder, expected = SparseAdapter.of(network).save(tmp_path / "a"), network(X.double())
    other = mlp(dtype=torch.float64)
    load_sara(other, folder)
    torch.testing.assert_close(other(X.double()), expected, rtol=0, atol=1e-6)


def test_a_base_in_half_precision_is_recognised(tmp_path):
    """Trained in float32, used in bfloat16."""
    folder = SparseAdapter.of(tuned()).save(tmp_path / "a")
    half = mlp().to(torch.bfloat16)
    load_sara(half, folder)
    whole = mlp()
    load_sara(whole, folder)
    expected = dict(whole.named_parameters())["0.weight"]
    torch.testing.assert_close(dict(half.named_parameters())["0.weight"].float(), expected, rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="another base model: 0.weight has the hash .* in bfloat16, wanted"):
        load_sara(mlp(seed=1).to(torch.bfloat16), folder)


def test_mixtures_add_up_where_they_meet(tmp_path):
    """Of a wider and a narrower selection, and of other layers."""
    parts = {"wide": tuned(0, 0.1), "narrow": tuned(1, 0.05), "first": tuned(2, 0.1, target_modules=["0"])}
    folders = {name: SparseAdapter.of(network).save(tmp_path / name) for name, network in parts.items()}
    scales = {"wide": 0.5, "narrow": -2.0, "first": 1.5}
    output = mix_adapters([(folders[n], s) for n, s in scales.items()], tmp_path / "mix", scale=0.3)
    got = mlp()
    load_sara(got, output)
    start = mlp().state_dict()
    expected = {k: v.double() for k, v in start.items()}
    for name, scale in scales.items():
        state = fused(parts[name]).state_dict()
        for key in state:
            expected[key] = expected[key] + 0.3 * scale * (state[key].double() - start[key].double())
    for key, value in got.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-7)
    record = json.loads((output / "mix.json").read_text())
    # All that the narrow one and the first one change the wide one changes as well; the first layer's is in all three.
    narrow, first = (sara_layers(parts[name]) for name in ("narrow", "first"))
    places = len(first["0.weight"].index) + len(narrow["2.weight"].index)
    assert record["shared"] == places and record["scale"] == 0.3
    one = SparseAdapter.read(folders["wide"] / SARA_NAME)
    (same, shared) = mixed([(one, 1.0)])
    assert shared == 0
    for name, (index, delta) in one.changes.items():
        assert torch.equal(same.changes[name][0], index) and torch.equal(same.changes[name][1], delta)
    nothing = mlp()
    Applied(nothing, [(one, 0.0)])
    assert all(torch.equal(v, start[k]) for k, v in nothing.state_dict().items())
    # The order does not matter.
    other = mlp()
    Applied(other, [(SparseAdapter.read(folders[n] / SARA_NAME), 0.3 * scales[n]) for n in reversed(scales)])
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, got.state_dict()[key], rtol=0, atol=1e-7)


def test_what_a_base_in_half_precision_is_refused_on(tmp_path):
    """Trained in half precision: the digits that the whole base has beside are not in the hashes."""
    for half in (torch.bfloat16, torch.float16):
        folder = SparseAdapter.of(tuned(dtype=half)).save(tmp_path / str(half))
        with pytest.raises(
            ValueError, match=f"SaRA is of this base model in {half}, .* load the model with dtype={half}"
        ):
            load_sara(mlp(), folder)
        load_sara(mlp(dtype=half), folder)
        with pytest.raises(ValueError, match="of another base model"):
            load_sara(mlp(seed=1), folder)


def test_onto_weights_of_any_layout(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3))

    live = network()
    with torch.no_grad():
        for sara in add_sara(live, threshold=0.05).values():
            sara.delta += 0.5
    folder = SparseAdapter.of(live).save(tmp_path / "a")
    last = network().to(memory_format=torch.channels_last)
    start = copy.deepcopy(last.state_dict())
    applied = load_sara(last, folder)
    assert not last[1].weight.is_contiguous() and torch.equal(last[1].weight, live[1].weight)
    assert torch.equal(last[0].weight, live[0].weight)
    applied.undo()
    assert all(torch.equal(v, start[k]) for k, v in last.state_dict().items())


def test_a_mixture_is_of_one_network_and_counts_places_once(tmp_path):
    one = SparseAdapter.of(tuned())
    places = sum(len(index) for index, _ in one.changes.values())
    assert mixed([(one, 1.0), (one, 1.0), (one, 1.0)])[1] == places
    # Of another network in layers of other names, so that no base says it.
    other = replace(one, network="unet", changes={"a": one.changes["0.weight"]}, base={"a": one.base["0.weight"]})
    with pytest.raises(ValueError, match="of different networks, transformer and unet"):
        mixed([(one, 1.0), (one, 1.0), (other, 1.0)])
    folders = [adapter.save(tmp_path / adapter.network) for adapter in (one, other)]
    with pytest.raises(ValueError, match="of different networks"):
        mix_adapters([(folder, 1.0) for folder in folders], tmp_path / "mix")
    assert not (tmp_path / "mix").exists()
    with pytest.raises(ValueError, match=r"adapters=\[\]: at least one is needed"):
        mixed([])


def test_the_same_changes_are_the_same_bytes(tmp_path):
    """In every process, though safetensors orders its metadata anew in each."""
    expected = SparseAdapter.of(tuned()).save(tmp_path / "a") / SARA_NAME
    with safe_open(expected, "pt") as file:
        assert list(file.metadata()) == ["sara"]
    again = SparseAdapter.read(expected).save(tmp_path / "b") / SARA_NAME
    assert again.read_bytes() == expected.read_bytes()


def test_onto_a_network_in_peft(tmp_path):
    folder, expected = SparseAdapter.of(tuned()).save(tmp_path / "a"), tuned()(X)
    wrapped = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    load_sara(wrapped, folder)
    assert torch.equal(wrapped(X), expected)
    # And trained in PEFT, used without.
    wrapped = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for sara in add_sara(wrapped, threshold=0.05).values():
            sara.delta += 0.01
    live = wrapped(X)
    plain = mlp()
    load_sara(plain, SparseAdapter.of(wrapped).save(tmp_path / "b"))
    assert torch.equal(plain(X), live)


def test_refusals(tmp_path):
    folder = SparseAdapter.of(tuned()).save(tmp_path / "a")
    network = mlp()
    state = copy.deepcopy(network.state_dict())

    def refused(text, path, target=network, error=ValueError):
        with pytest.raises(error, match=text):
            load_sara(target, path)
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())

    refused("another base model: 0.weight has the hash", folder, mlp(seed=1))
    nearly = mlp()
    with torch.no_grad():
        nearly[2].weight[3, 4] += 1e-3
    refused("another base model: 2.weight has the hash", folder, nearly)
    refused("another base model", folder, fused(tuned(5)))  # another SaRA's merged weights are another base
    refused(
        r"another network: 0.weight of \(48, 32\); Sequential has \(8, 32\)", folder, nn.Sequential(nn.Linear(32, 8))
    )
    refused(r"another network: 0.weight of \(48, 32\); Linear has nothing", folder, nn.Linear(32, 8))
    refused("has a SaRA that trains; merge_sara", folder, tuned())
    refused("nowhere is missing", tmp_path / "nowhere", error=FileNotFoundError)
    with pytest.raises(ValueError, match="Sequential has no SaRA"):
        SparseAdapter.of(network)

    def changed(name, change, **more):
        with safe_open(folder / SARA_NAME, "pt") as file:
            header = dict(sara=json.dumps(json.loads(file.metadata()["sara"]) | more))
        tensors = load_file(folder / SARA_NAME)
        change(tensors)
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / SARA_NAME, header)
        return tmp_path / name

    index, delta = "transformer.0.weight.index", "transformer.0.weight.delta"
    size = len(load_file(folder / SARA_NAME)[index])
    beyond = torch.full((size,), 48 * 32, dtype=torch.int32)
    refused("or some beyond 1536", changed("beyond", lambda t: t.update({index: beyond})))
    refused("places for 3 values", changed("short", lambda t: t.update({delta: torch.zeros(3)})))
    refused("not finite", changed("nan", lambda t: t.update({delta: torch.full((size,), torch.nan)})))
    refused("its tensors and its header differ in .*0.weight.delta", changed("half", lambda t: t.pop(delta)))
    refused("format is 'x', wanted 'genkit.sara/1'", changed("format", lambda t: None, format="x"))
    refused(
        r"changes of \['transformer', 'unet'\]", changed("two", lambda t: t.update({"unet.a.index": t[index].clone()}))
    )
    whole = (folder / SARA_NAME).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("truncated", tmp_path / "cut.safetensors")

    other = mlp(seed=1)
    add_sara(other, threshold=0.05)
    foreign = SparseAdapter.of(other).save(tmp_path / "other")
    with pytest.raises(ValueError, match="0.weight: the adapters are of different base models"):
        mix_adapters([(folder, 1), (foreign, 1)], tmp_path / "mix")
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file({"transformer.0.lora_A.weight": torch.zeros(2, 32)}, lora / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="is a SaRA, .* a LoRA: no file holds both"):
        mix_adapters([(lora, 1), (folder, 1)], tmp_path / "mix")
    assert not (tmp_path / "mix").exists()
