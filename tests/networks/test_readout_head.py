"""Readout heads: what they read, how they mix it, how many weights they have, where they are saved."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.denoisers.base import Condition
from genkit.interpolants import DiscreteVP, Linear
from genkit.networks.dit import DiT
from genkit.networks.readout_head import ReadoutHead, capture, from_released, on_grid, readable

SDXL = [1280] * 3 + [640] * 3 + [320] * 3
SD15 = [1280] * 6 + [640] * 3 + [320] * 3
SMALL = dict(projection_dim=24, norm_num_groups=2)


def network_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def on_meta(channels, kind):
    with torch.device("meta"):
        return ReadoutHead([str(i) for i in range(len(channels))], channels, kind=kind, time_module="time_embedding")


@pytest.mark.parametrize(
    ("channels", "kind", "count"),
    [
        (SDXL, "spatial", 5_907_436),
        (SDXL, "feature", 5_427_945),
        (SD15, "spatial", 8_484_751),
        (SD15, "feature", 8_005_260),
    ],
)
def test_numbers_of_weights(channels, kind, count):
    assert sum(p.numel() for p in on_meta(channels, kind).parameters()) == count


@pytest.mark.parametrize(
    ("channels", "ups", "layers"),
    [
        (SDXL, ("UpBlock2D", "UpBlock2D", "UpBlock2D"), (320, 640, 1280)),
        (SD15, ("UpBlock2D",) * 4, (320, 640, 1280, 1280)),
    ],
)
def test_the_decoders_of_the_published_unets_are_read(channels, ups, layers):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=layers, down_block_types=("DownBlock2D",) * len(layers), up_block_types=ups
        )
    assert [d for _, d in readable(unet)] == channels
    head = ReadoutHead.for_network(unet, projection_dim=24, norm_num_groups=2)
    assert head.config.time_module == "time_embedding" and head.config.time_channels == 1280


def test_equal_weights_give_the_average_and_order_does_not_matter():
    head = ReadoutHead(["a", "b", "c"], [4, 6, 24], kind="feature", **SMALL).double()
    features = [torch.randn(2, d, 5, 5, dtype=torch.float64) for d in (4, 6, 24)]
    each = torch.stack([block(f, None) for block, f in zip(head.blocks, features, strict=True)])
    torch.testing.assert_close(head(features, None, (5, 5)), each.mean(0), rtol=1e-12, atol=1e-12)
    nn.init.normal_(head.mixing)
    expected = (head.mixing.softmax(0).view(3, 1, 1, 1, 1) * each).sum(0)
    torch.testing.assert_close(head(features, None, (5, 5)), expected, rtol=1e-12, atol=1e-12)
    order = [2, 0, 1]
    permuted = ReadoutHead(list("cab"), [24, 4, 6], kind="feature", **SMALL).double()
    permuted.blocks = nn.ModuleList(head.blocks[i] for i in order)
    permuted.mixing = nn.Parameter(head.mixing[order])
    again = permuted([features[i] for i in order], None, (5, 5))
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def test_a_spatial_head_is_a_map_between_minus_one_and_one_that_may_depend_on_time():
    head = ReadoutHead(["a"], [8], out_channels=2, time_module="t", time_channels=5, **SMALL)
    features, temb = [torch.randn(3, 8, 4, 6)], torch.randn(3, 5)
    with_time, without = head(features, temb, (8, 12)), head(features, None, (8, 12))
    assert with_time.shape == (3, 2, 8, 12) and with_time.abs().max() <= 1
    assert (with_time - without).abs().max() > 1e-4


def test_tokens_are_rows_of_patches_after_the_text():
    tokens = torch.arange(7.0).view(1, 7, 1)
    assert on_grid(tokens, (4, 6), 2).shape == (1, 1, 4, 6)
    assert on_grid(tokens, (2, 3), 1)[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert on_grid(torch.randn(2, 5), (1, 1), 1).shape == (2, 5, 1, 1)
    with pytest.raises(ValueError, match=r"patch_size=1: \(4, 4\) latents have 16 patches, the network 7 tokens"):
        on_grid(tokens, (4, 4), 1)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "dit"])
def test_reads_every_network_where_its_features_are(name, tiny_pipeline):
    """The features are those of an independent hook, and the embedding that of the timestep alone."""
    pipe = tiny_pipeline(name)
    network = network_of(pipe).double()
    head = ReadoutHead.for_network(network, **SMALL).double()
    encode = dict(prompt="a cat", negative_prompt="")
    if name in ("sd3", "flux"):
        encode["max_sequence_length"] = 16
    if name == "sdxl":
        encode |= dict(height=32, width=32)
    denoiser = from_pipeline(pipe)
    condition = denoiser.encode(pipe, **({"class_labels": [1]} if name == "dit" else encode)).to(torch.float64)
    seen = {}
    handles = [
        network.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(n, o))
        for n in head.config.at
    ]
    z, t = torch.randn(1, 4, 16, 16, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    _, captured = capture(denoiser, [head], z, t, condition)
    for handle in handles:
        handle.remove()
    assert list(captured.features) == list(head.config.at)
    assert all(torch.equal(captured.features[n], seen[n]) for n in seen)
    assert head.read(captured, (16, 16)).shape == (1, 3, 16, 16)
    parent = network.get_submodule(head.config.time_module.rpartition(".")[0])
    native = denoiser.interpolant.timestep(t).reshape(1)
    expected = network.get_submodule(head.config.time_module)(parent.time_proj(native).double())
    torch.testing.assert_close(captured.times[head.time_key], expected, rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks for m in network.modules())


def test_reads_genkits_own_transformer():
    network = DiT(hidden_size=16, num_layers=2, num_heads=2, patch_size=4)
    assert readable(network) == [("blocks.0.fc2", 16), ("blocks.1.fc2", 16)]
    head = ReadoutHead.for_network(network, readable(network)[1:], **SMALL)
    assert (head.config.time_module, head.config.time_channels, head.config.patch_size) == ("time_embed", 16, 4)


def test_the_conventions_of_the_time_embedding(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    denoiser = from_pipeline(pipe)
    condition, z = denoiser.encode(pipe, "a cat", negative_prompt=""), torch.randn(1, 4, 16, 16)
    heads = {c: ReadoutHead.for_network(pipe.unet, temb_convention=c, **SMALL) for c in ("timestep", "reversed")}
    early, late = (torch.tensor(v, dtype=torch.float64) for v in (0.301, 0.700))  # timesteps 300 and 699
    seen = {t: capture(denoiser, heads.values(), z, t, condition)[1].times for t in (early, late)}
    for one, other in ((early, late), (late, early)):
        reversed_ = seen[one]["time_embedding", "reversed"]
        torch.testing.assert_close(reversed_, seen[other]["time_embedding", "timestep"])
    without = ReadoutHead.for_network(pipe.unet, temb_convention="none", **SMALL)
    assert without.time_key is None and without.blocks[0].time is not None
    _, captured = capture(denoiser, [without], z, early, condition)
    assert captured.times == {}
    expected = without([captured.features[n] for n in without.config.at], None, (16, 16))
    assert torch.equal(without.read(captured, (16, 16)), expected)


def test_no_reversal_where_timesteps_are_not_numbered():
    network = DiT(hidden_size=16, num_layers=1, num_heads=2)
    head = ReadoutHead.for_network(network, temb_convention="reversed", **SMALL)
    denoiser = FunctionDenoiser(network, Linear(), "flow_prediction")
    with pytest.raises(ValueError, match="temb_convention='reversed': DiT on Linear numbers no timesteps"):
        capture(denoiser, [head], torch.randn(1, 1, 8, 8), torch.tensor(0.5))


def test_saved_and_loaded(tmp_path):
    head = ReadoutHead(["a", "b"], [4, 8], time_module="t", time_channels=5, temb_convention="none", **SMALL)
    head.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = ReadoutHead.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in head.config.items() if k[0] != "_"
    }
    features = [torch.randn(2, 4, 6, 6), torch.randn(2, 8, 3, 3)]
    assert torch.equal(head.eval()(features, None, (6, 6)), again(features, None, (6, 6)))


def released(head, sequential):
    """The weights of ``head`` under the names of the released files."""
    names = {}
    for key, tensor in head.state_dict().items():
        first, _, rest = key.partition(".")
        if first == "mixing":
            names["mixing_weights"] = tensor
        elif first == "output":
            names[f"output_head.{rest}"] = tensor
        else:
            i, layer, *rest = rest.split(".")
            if layer == "time":
                path = ["emb_layers", *rest]
            else:
                path = [layer, rest[1]] if rest[0] == "0" else [layer, "norm", rest[1]]
            names[".".join(["bottleneck_layers", i, *(["0"] if sequential else []), *path])] = tensor
    return names


@pytest.mark.parametrize("kind", ["spatial", "feature"])
@pytest.mark.parametrize("sequential", [False, True])
def test_released_weights(kind, sequential, tiny_pipeline):
    unet = tiny_pipeline("sd15").unet
    head = ReadoutHead.for_network(unet, kind=kind, **SMALL)
    nn.init.normal_(head.mixing)
    state = released(head, sequential)
    assert "bottleneck_layers.0.0.conv1.norm.weight" in state or not sequential
    again = from_released(state, unet, norm_num_groups=2)
    assert again.config.kind == kind and again.config.temb_convention == ("none" if sequential else "timestep")
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="'unet.weight', which no released readout head has"):
        from_released({**state, "unet.weight": torch.zeros(1)}, unet)
    with pytest.raises(ValueError, match=r"channels, network=DiT has \[16\]"):
        from_released(state, DiT(hidden_size=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(at=[], channels=[]), r"at=\[\] and channels=\[\]: accepted is one number for each module"),
        (dict(at=["a"], channels=[1, 2]), "accepted is one number for each module"),
        (dict(kind="spacial"), "kind='spacial' is not known; did you mean 'spatial'"),
        (dict(temb_convention="t"), "temb_convention='t' is not known"),
        (dict(projection_dim=40), "projection_dim=40, norm_num_groups=2: accepted are multiples of 12"),
        (dict(norm_num_groups=4), "norm_num_groups=4"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ReadoutHead(**dict(at=["a"], channels=[4]) | SMALL | settings)


def test_networks_without_such_modules():
    with pytest.raises(ValueError, match="network=Linear has neither up_blocks of residual blocks nor transformer"):
        readable(nn.Linear(2, 2))
    head = ReadoutHead(["body"], [4], **SMALL)
    denoiser = FunctionDenoiser(nn.Identity(), DiscreteVP(torch.linspace(0.99, 0.01, 10)), "epsilon")
    with pytest.raises(ValueError, match=r"at=\['body'\]: no such sub-modules"):
        capture(denoiser, [head], torch.randn(1, 4, 4, 4), torch.tensor(0.5), Condition())
