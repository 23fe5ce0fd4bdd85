"""Readout heads are trained on a frozen network, exported, loaded, and then guide it."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from genkit.data.base import SeededConfig, Source
from genkit.data.digits import Digits
from genkit.denoisers.base import Condition
from genkit.guidance import CFG
from genkit.guidance.readout import Readout, SpatialTarget
from genkit.networks.readout_head import ReadoutHead
from genkit.pipelines import ClassConditionalPipeline
from genkit.rng import ItemRNG
from genkit.training import logs
from genkit.training.build import build
from genkit.training.compare import first_difference
from genkit.training.config import TrainConfig, load_config
from genkit.training.export import export
from genkit.training.inputs import Inputs
from genkit.training.objectives.base import Batch
from genkit.training.objectives.readout import distance, edges, map_error, point_error
from genkit.training.trainer import Trainer
from tests.training.test_fsdp import launch

F64 = torch.float64
HEAD = dict(modules=["sample", "blocks.0.fc2"], projection_dim=24, norm_num_groups=2)


def trainer(toys, folder, source=None, **objective):
    """80 steps of a head on an untrained network."""
    settings = dict(
        objective=dict(name="readout") | HEAD | objective,
        global_batch_size=32,
        max_train_steps=80,
        checkpointing_steps=80,
        optimizer=dict(name="AdamW", lr=5e-3, weight_decay=0.0),
        ema=dict(decays=[0.9]),
    )
    run = build(TrainConfig(**toys.settings(folder, **settings)).check())
    if source is not None:
        run = replace(run, source=source, inputs=Inputs(run.pipe, run.student, source, 0))
    return Trainer(run, quiet=True)


def lines(folder):
    return logs.read(folder / "metrics.jsonl")


def mean(values):
    return sum(values) / len(values)


# -- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_a_spatial_head_learns_edges_and_leaves_the_network_alone(sparse, toys, tmp_path):
    run = trainer(toys, tmp_path, sparse=sparse)
    before = [p.clone() for p in run.run.student.module.parameters()]
    toys.run(run)
    log = lines(tmp_path)
    # The best constant explains nothing and leaves the edges' variance.
    assert log[0]["explained"] < 0 and mean([line["explained"] for line in log[-20:]]) > 0.3
    if not sparse:
        variance = edges(Digits().images).var().item()
        assert log[0]["loss"] > variance and mean([line["loss"] for line in log[-20:]]) < 0.7 * variance
    after = list(run.run.student.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    files = {p.name for p in (tmp_path / "checkpoint-80").iterdir()}
    assert {"head.safetensors", "head.ema.safetensors"} <= files and not any("student" in f for f in files)
    folder = export(run)
    assert folder == tmp_path / "head"
    head = ReadoutHead.from_pretrained(folder)
    assert list(head.config.at) == HEAD["modules"] and head.config.time_module == "time_embed"
    with run.roles["head"].ema.swapped():
        averaged = [p.clone() for p in run.objective.head.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(averaged, head.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(averaged, run.objective.head.parameters(), strict=True))


class Shifted(Source):
    """Digits and the same rolled by a pixel or two: it is known where everything went."""

    Config = SeededConfig
    shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, **settings):
        super().__init__(**settings)
        self.digits = Digits()
        self.length = len(self.digits)

    def read(self, records, items):
        rng, read = self.rng(items), self.digits.read(records, items)
        by, start = rng.integers(3, (2,)), rng.integers(8, (12, 2))
        pair = torch.stack([x.roll(tuple(s), (1, 2)) for x, s in zip(read["x0"], by.tolist(), strict=True)])
        points = torch.stack((start, (start + by[:, None]) % 8), dim=2)
        points[:, 9:] = -1  # fewer than there is room for
        return {**read, "pair": pair, "points": points, "positive": pair, "negative": -pair}


def test_a_correspondence_head_learns_where_things_went(toys, tmp_path):
    toys.run(trainer(toys, tmp_path, Shifted(), kind="correspondence", t_max=0.05))
    losses = [line["loss"] for line in toys.losses(tmp_path)]
    assert losses[0] < math.log(64)  # of guessing among 64 places: even random features of pictures know better
    assert mean(losses[-10:]) < 0.7 * mean(losses[:5])


def test_an_appearance_head_learns_what_looks_alike(toys, tmp_path):
    toys.run(trainer(toys, tmp_path, Shifted(), kind="appearance", margin=0.5, t_max=0.5))
    log = lines(tmp_path)
    assert log[0]["loss"] > 0.3 and mean([line["loss"] for line in log[-10:]]) < 0.15
    assert mean([line["gap"] for line in log[-10:]]) > 0.4


def test_a_field_of_the_data_is_a_target(toys, tmp_path):
    """``edges`` and the same map brought by the data are one objective."""

    class Brought(Digits):
        def read(self, records, items):
            read = super().read(records, items)
            return {**read, "contours": edges(read["x0"]) - 0.5}

    runs = [
        trainer(toys, tmp_path / str(i), source, **changes)
        for i, (source, changes) in enumerate([(None, {}), (Brought(), dict(target="contours"))])
    ]
    for run in runs:
        toys.run(run, stop=10)
    for a, b in zip(*(run.objective.head.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(toys, tmp_path):
    objective = trainer(toys, tmp_path).objective
    read = Digits().__getitems__(range(6))
    labels = read["class_labels"]
    condition, index = Condition({"class_labels": labels}, {"class_labels": torch.full((6,), 10)}), torch.arange(6)

    def loss(rows):
        batch = Batch(read["x0"][rows], condition.index(rows), index[rows], {"x0": read["x0"][rows]})
        (phase,) = objective.phases(0)
        return objective(phase, batch, ItemRNG(0, index[rows])).value

    whole = loss(torch.arange(6))
    parts = torch.stack([loss(rows) for rows in torch.arange(6).split(2)])
    torch.testing.assert_close(parts.mean(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_of_shards_train_and_export_the_head_of_one(toys, tmp_path):
    shared = dict(objective=dict(name="readout") | HEAD, checkpointing_steps=4, max_train_steps=8)
    done = launch(tmp_path, toys.settings(tmp_path / "two", **shared))
    assert done.returncode == 0, done.stderr
    toys.run(toys.digits(tmp_path / "one", **shared))
    assert first_difference(toys.losses(tmp_path / "one"), toys.losses(tmp_path / "two"), 1e-5) is None
    head = ReadoutHead.from_pretrained(tmp_path / "two/head")
    averages = load_file(tmp_path / "two/checkpoint-8/head.ema.safetensors")
    assert all(torch.equal(p, averages[f"0.9/{name}"]) for name, p in head.named_parameters())


def test_without_its_condition_the_network_sees_the_null_class(toys, tmp_path):
    seen = []
    for unconditional in (True, False):
        run = trainer(toys, tmp_path / str(unconditional), unconditional=unconditional)
        embedding = run.run.student.module.class_embed
        embedding.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        toys.run(run, stop=1)
    assert (seen[0] == 10).all() and (seen[1] < 10).all()


def test_trained_on_digits_a_head_steers_their_edges(toys, tmp_path):
    """Model, head and guidance in one: samples follow the edges of given digits, which the class alone does not fix."""
    model = dict(network="dit", hidden_size=64, num_layers=2, num_heads=2, patch_size=4, sigma_data=0.75)
    common = dict(global_batch_size=64, checkpointing_steps=300, ema=dict(decays=[0.98]), lr_warmup_steps=10)
    settings = toys.settings(tmp_path / "model", model=model, max_train_steps=300, **common)
    flow = Trainer(build(TrainConfig(**settings | dict(optimizer=dict(name="AdamW", lr=4e-3))).check()), quiet=True)
    toys.run(flow)
    settings = toys.settings(
        tmp_path / "head",
        model=dict(pretrained=str(export(flow))),
        objective=dict(name="readout", **HEAD),
        max_train_steps=300,
        **common,
    )
    run = Trainer(build(TrainConfig(**settings | dict(optimizer=dict(name="AdamW", lr=4e-3))).check()), quiet=True)
    toys.run(run)
    head = ReadoutHead.from_pretrained(export(run))
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "model/pipeline")
    pipe.set_progress_bar_config(disable=True)
    read = Digits().__getitems__(range(16))
    wanted = edges(read["x0"]) - 0.5
    latents = ItemRNG(1, range(16)).normal((1, 8, 8))

    def drawn(guider):
        images = pipe(read["class_labels"].tolist(), 16, latents=latents, guider=guider, output_type="latent").images
        return (edges(images) - 0.5 - wanted).square().mean().item(), guider.stats()

    plain, _ = drawn(CFG(guidance_scale=2.0))
    targets = {"edges": SpatialTarget(head=head, control=wanted)}
    for update in ("adam_sign", "normalised"):
        guider = Readout(guidance_scale=2.0, update=update, step_size=0.08, readout_stop=0.9).using(targets=targets)
        steered, stats = drawn(guider)
        assert steered < 0.5 * plain
        loss = stats["loss_edges"].mean(1)
        assert loss[loss.isfinite()][-1] < 0.2 * loss[0]
    others = {"edges": SpatialTarget(head=head, control=wanted.roll(1, 0))}
    assert drawn(guider.using(targets=others))[0] > plain  # it is the target that does it


# -- closed forms ---------------------------------------------------------------------------------------------------


def test_edges_of_a_ramp_and_of_a_plane():
    ramp = torch.linspace(-1, 1, 9, dtype=F64).expand(1, 2, 5, 9)
    found = edges(ramp)
    assert found.shape == (1, 1, 5, 9)
    torch.testing.assert_close(found[..., 1:-1], torch.full((1, 1, 5, 7), 0.25, dtype=F64))
    assert edges(torch.ones(1, 3, 4, 4)).abs().max() == 0
    step = torch.ones(1, 1, 4, 4)
    step[..., 2:] = -1
    assert edges(step)[0, 0, 0].tolist() == [0, 1, 1, 0]


def test_background_and_foreground_weigh_the_same():
    target = torch.full((3, 1, 2, 2), -0.5, dtype=F64)
    target[0, 0, 0, 0] = 0.5
    target[2] = 0.5
    readout = target.clone()
    readout[:, :, 0, 0] += 0.4  # all of the first sample's foreground
    expected = torch.tensor([0.08, 0.04, 0.04], dtype=F64)  # with one kind only: the plain mean
    torch.testing.assert_close(map_error(readout, target, -0.5), expected)
    torch.testing.assert_close(map_error(readout, target), torch.full((3,), 0.04, dtype=F64))


def test_points_and_distances_of_perfect_features():
    features = torch.eye(16, dtype=F64).view(1, 16, 4, 4)
    points = torch.tensor([[[[0, 1], [0, 1]], [[3, 2], [3, 2]], [[-1, -1], [-1, -1]]]])
    hit = -math.log(math.exp(1 / 0.07) / (math.exp(1 / 0.07) + 15))
    torch.testing.assert_close(point_error(features, features, points, 0.07), torch.tensor([hit], dtype=F64))
    missed = points.clone()
    missed[0, 0, 1] = torch.tensor([2, 2])
    expected = torch.tensor([hit + 0.5 / 0.07], dtype=F64)
    torch.testing.assert_close(point_error(features, features, missed, 0.07), expected)
    assert point_error(features, features, points - 9, 0.07).item() == 0
    assert distance(features, features).item() == 0
    torch.testing.assert_close(distance(features, -features), torch.tensor([2.0], dtype=F64))


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="spacial"), "objective.kind='spacial'"),
        (dict(target_range=[0.5, -0.5]), "target_range.*low < high"),
        (dict(modules=["block.0"]), "objective.modules='block.0' is not known"),
        (dict(projection_dim=20), "projection_dim=20, norm_num_groups=2: accepted are multiples of 12"),
    ],
)
def test_bad_settings(settings, message, toys, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(toys, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        (dict(target="edge"), {}, "field of the data='edge' is not known"),
        (dict(out_channels=3), {}, r"objective.target='edges' has shape \(8, 1, 8, 8\); accepted is \(B, 3, H, W\)"),
        (dict(target="flat"), {"flat": torch.zeros(8, 8)}, r"objective.target='flat' has shape \(8, 8\)"),
        (dict(kind="appearance"), {}, "field of the data='positive' is not known"),
        (
            dict(kind="correspondence"),
            {"pair": torch.zeros(8, 3, 8, 8)},
            r"field 'pair' .* accepted is .* \(8, 1, 8, 8",
        ),
        (
            dict(kind="correspondence"),
            {"pair": torch.zeros(8, 1, 8, 8), "points": torch.full((8, 1, 2, 2), 8)},
            r"field 'points' .* below \(8, 8\)",
        ),
    ],
)
def test_data_that_does_not_fit(settings, fields, message, toys, tmp_path):
    class Bringing(Digits):
        def read(self, records, items):
            return {**super().read(records, items), **{k: v[: len(records)] for k, v in fields.items()}}

    run = trainer(toys, tmp_path, Bringing(), **settings)
    batch = run.run.inputs(Bringing().__getitems__(range(8)) | {"index": torch.arange(8)}, torch.device("cpu"))
    (phase,) = run.objective.phases(0)
    with pytest.raises(ValueError, match=message):
        run.objective(phase, batch, ItemRNG(0, range(8)))


def test_the_recipe_is_that_of_the_model():
    config = load_config("configs/digits/readout.yaml")
    network = load_config("configs/digits/flow_matching.yaml").model.settings
    blocks = [f"blocks.{i}.fc2" for i in range(network["num_layers"])]
    assert config.objective_config().modules == ["sample", *blocks]
    assert config.model.pretrained.startswith(str(load_config("configs/digits/flow_matching.yaml").output_dir))
