import pytest
import torch
from safetensors.torch import load_file

from genkit import int8, textual_inversion
from genkit.denoisers import from_pipeline
from genkit.interpolants import Linear
from genkit.rng import ItemRNG
from genkit.testing import tiny
from genkit.training import logs
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.export import export
from genkit.training.objectives.base import Batch, Condition, Phase
from genkit.training.objectives.zoodip import ZOODiP, ZOODiPConfig
from genkit.training.samples import draw
from genkit.training.trainer import Trainer

PHASE = Phase("embedding", trains=("embedding",))


def objective(pipe, **settings):
    return ZOODiP(ZOODiPConfig(**settings), from_pipeline(pipe), pipe=pipe)


def batch_of(n, shape=(4, 16, 16), prompts=None, step=0):
    x0 = ItemRNG(3, range(n)).normal(shape)
    return Batch(x0, Condition(), torch.arange(n), {"x0": x0}, prompts, step, 10)


def test_numbers_of_classes_may_be_numbers():
    assert ZOODiPConfig(token=4).token == "4"
    for bad in (True, 1.5, None):
        with pytest.raises(ValueError, match="token"):
            ZOODiPConfig(token=bad)


def test_signs(tiny_pipeline):
    """Directions of ones and minus ones, which the estimate adds up: it has two values, for one direction."""
    settings = dict(token="<it>", initializer="a", templates=["{}"], num_directions=1, subspace=None)
    found = []
    for directions in ("signs", "normal"):
        made = objective(tiny_pipeline("sd15"), directions=directions, **settings)
        (loss,) = made.losses(PHASE, batch_of(2), ItemRNG(1, range(2)))
        (gradient,) = torch.autograd.grad(loss.value, list(made.embedding.values))
        found.append(gradient)
    assert found[0].abs().max() > 0 and len(found[0].abs().unique()) == 1 and len(found[0].unique()) == 2
    assert len(found[1].abs().unique()) > 2


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_text_to_image_pipelines_learn_a_token(name, toys, tiny_pipeline, tmp_path):
    tiny_pipeline(name).save_pretrained(tmp_path / "base")
    config = TrainConfig(
        output_dir=tmp_path / "run",
        model=dict(pretrained=str(tmp_path / "base")),
        objective=dict(
            name="zoodip", token="<it>", initializer="a", templates=["b {}", "{} c"], subspace=dict(window=3)
        ),
        data=dict(name="synthetic"),
        optimizer=dict(name="Adam", lr=5e-3, eps=1e-3),
        global_batch_size=2,
        max_train_steps=6,
        logging_steps=1,
        max_grad_norm=None,
        ema=None,
    ).check()
    trainer = Trainer(build(config), quiet=True)
    frozen = {n: p.clone() for n, p in trainer.run.student.module.named_parameters()}
    toys.run(trainer)
    lines = logs.read(tmp_path / "run" / logs.FILE)
    assert [bool(line["removed"]) for line in lines] == [False] * 3 + [True] * 3
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.run.student.module.named_parameters())
    folder, start = export(trainer), tiny_pipeline(name)
    assert folder == tmp_path / "run" / "embedding"
    encoders = textual_inversion.text_encoders(start)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == len(encoders)
    moved = []
    for file, (tokenizer, encoder) in zip(files, encoders.values(), strict=True):
        (word,) = tokenizer("a", add_special_tokens=False)["input_ids"]
        moved.append((load_file(file)["<it>"][0] - encoder.get_input_embeddings().weight[word]).abs().max())
    assert all(0 < m < 6 * 5e-3 + 1e-6 for m in moved)
    textual_inversion.load(start, folder)


def recipe(tmp_path, objective, **more):
    settings = dict(
        output_dir=tmp_path / "run",
        model=dict(pretrained=str(tmp_path / "base")),
        objective=dict(name="zoodip", subspace=dict(window=2)) | objective,
        optimizer=dict(name="Adam", lr=5e-3, eps=1e-3),
        global_batch_size=2,
        max_train_steps=4,
        max_grad_norm=None,
        ema=None,
    )
    return TrainConfig(**settings | more).check()


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_class_of_a_network_with_several_tables(quantization, toys, tiny_pipeline, tmp_path):
    """What is exported makes of a fresh pipeline the one that was trained, which can be saved as a whole, too."""
    tiny_pipeline("dit").save_pretrained(tmp_path / "base")
    config = recipe(tmp_path, dict(token="3", quantization=quantization), data=dict(name="synthetic"))
    trainer = Trainer(build(config), quiet=True)
    toys.run(trainer)
    pipe, fresh = trainer.run.pipe, tiny_pipeline("dit")
    starts = [row.table.weight[3] for row in trainer.objective.embedding.rows]
    assert len(starts) == 2
    assert all(not torch.equal(a, b) for a, b in zip(trainer.objective.embedding.values, starts, strict=True))
    assert textual_inversion.load(fresh, export(trainer)) == "3"
    if quantization == "int8":
        for part in (fresh.transformer, fresh.vae):
            int8.quantize(part.requires_grad_(False))
    pipe.save_pretrained(tmp_path / "whole")
    drawn = []
    for p in (pipe, fresh, type(pipe).from_pretrained(tmp_path / "whole")):
        p.set_progress_bar_config(disable=True)
        arguments = tiny.call_arguments("dit") | dict(class_labels=[3], generator=torch.Generator().manual_seed(0))
        drawn.append(torch.as_tensor(p(**arguments).images))
    for image in drawn[1:]:
        torch.testing.assert_close(image, drawn[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "dit"])
def test_samples_are_of_the_token_whatever_the_data_says(name, toys, tiny_pipeline, tmp_path):
    """Pictures without captions, and of no class."""
    tiny_pipeline(name).save_pretrained(tmp_path / "base")
    words = dict(token="<it>", initializer="a", templates=["b {}"]) if name == "sd15" else dict(token=3)
    sampling = dict(every=2, num_samples=2, num_inference_steps=2)
    data = dict(name="synthetic", shape=(4, 16, 16))
    trainer = Trainer(build(recipe(tmp_path, words, data=data, sampling=sampling)), quiet=True)
    assert not trainer.run.source.__getitems__([0]).keys() & {"prompts", "class_labels"}
    toys.run(trainer)
    assert sorted(f.name for f in (tmp_path / "run" / "samples").glob("*.png")) == ["step-2.png", "step-4.png"]
    made, rng = trainer.objective, ItemRNG(0, range(2))
    drawn = [draw(trainer.run, {}, rng[:], 2, data["shape"])]
    with made.embedding.at(made.embedding.flat.detach() + 1):
        drawn.append(draw(trainer.run, {}, rng[:], 2, data["shape"]))
    assert not torch.equal(*drawn)


def test_everything_is_in_eight_bits(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    made = objective(pipe, token="<it>", initializer="a", templates=["{}"])
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        assert any(isinstance(m, int8.Int8Weight) for m in part.modules())
        assert not any(type(m) in (torch.nn.Linear, torch.nn.Conv2d) for m in part.modules())
        assert not any(p.requires_grad for p in part.parameters())
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["embedding.values.0"]


def test_estimate_approaches_the_gradient(tiny_pipeline):
    """Along every axis, by central differences, it is that of back-propagation."""
    pipe = tiny_pipeline("sd15")
    made = objective(
        pipe, token="<it>", initializer="a", templates=["{} b"], quantization="none", subspace=None, step=1e-2
    ).double()
    for part in (pipe.unet, pipe.text_encoder):
        part.double()
    x0 = batch_of(2).x0.double()
    batch = Batch(x0, Condition(), torch.arange(2), {"x0": x0}, None, 0, 10)
    seen = {}

    def kept(loss, theta, directions, step, *, central):
        theta = theta.clone().requires_grad_()
        with torch.enable_grad():
            value = loss(theta)
        (seen["exact"],) = torch.autograd.grad(value, theta)
        basis = torch.eye(len(theta), dtype=theta.dtype)
        seen["estimate"] = len(theta) * estimate(loss, theta.detach(), basis, 1e-4, central=True)[0]
        return estimate(loss, theta.detach(), directions, step, central=central)

    from genkit.training.objectives import zoodip
    from genkit.training.parts.zeroth_order import estimate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoodip, "estimate", kept)
        # Encoding is without gradient, as in sampling, so the way back is opened for this comparison.
        encode = type(made.student).encode.__wrapped__
        patch.setattr(type(made.student), "encode", encode)
        (loss,) = made.losses(PHASE, batch, ItemRNG(1, range(2)))
    assert seen["exact"].norm() > 1e-8
    torch.testing.assert_close(seen["estimate"], seen["exact"], rtol=1e-5, atol=1e-10)


def test_gradient_of_the_loss_is_the_estimate(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    made = objective(pipe, token="<it>", initializer="a", templates=["{}"], num_directions=3)
    (loss,) = made.losses(PHASE, batch_of(2), ItemRNG(1, range(2)))
    loss.value.backward()
    gradient = made.embedding.values[0].grad
    torch.testing.assert_close(gradient.norm(), loss.logs["estimate_norm"])
    assert gradient.norm() > 0


def test_directions_belong_to_the_step_not_to_the_items(tiny_pipeline):
    """Halves of a batch give estimates along the same directions, so their mean is the whole's."""
    pipe = tiny_pipeline("sd15")
    made = objective(pipe, token="<it>", initializer="a", templates=["{}"], subspace=None)
    whole, gradients = batch_of(4), []
    for rows in (slice(0, 4), slice(0, 2), slice(2, 4)):
        x0, items = whole.x0[rows], torch.arange(4)[rows]
        (loss,) = made.losses(PHASE, Batch(x0, Condition(), items, {"x0": x0}, None, 5, 10), ItemRNG(1, items))
        gradients += torch.autograd.grad(loss.value, list(made.embedding.values))
    torch.testing.assert_close((gradients[1] + gradients[2]) / 2, gradients[0], rtol=2e-2, atol=1e-5)


def test_times_are_uniform_on_the_interval(tiny_pipeline):
    made = objective(tiny_pipeline("sd15"), token="<it>", initializer="a", templates=["{}"])
    t, timestep = made._times(ItemRNG(0, range(40_000)))
    assert timestep.min() == 500 and timestep.max() == 899 and timestep.dtype == torch.int64
    counts = timestep.sub(500).bincount(minlength=400).double()
    chi2 = float(((counts - 100).square() / 100).sum())
    assert abs(chi2 - 399) < 4 * (2 * 399) ** 0.5
    torch.testing.assert_close(t, ((timestep + 1) / 1000).float())


def test_times_stay_below_the_last(tiny_pipeline):
    words = dict(token="<it>", initializer="a", templates=["{}"])
    _, timestep = objective(tiny_pipeline("sd15"), t_min=0.9999, t_max=1, **words)._times(ItemRNG(0, range(9)))
    assert timestep.eq(999).all()


def test_times_of_a_flow_have_the_same_ratios_of_noise_to_signal(tiny_pipeline):
    pipe = tiny_pipeline("sd3")
    made, path = objective(pipe, token="<it>", initializer="a", templates=["{}"]), tiny_pipeline("sd15").scheduler
    t, timestep = made._times(ItemRNG(0, range(4000)))
    assert isinstance(made.student.interpolant, Linear)
    cumprod = path.alphas_cumprod.double()
    # t_min and t_max are 0.5 and 0.9 of the way, which are the timesteps 499 and 899.
    ratios = ((1 - cumprod) / cumprod).sqrt()[[499, 899]]
    low, high = ratios / (1 + ratios)
    assert low < t.min() < low + 1e-3 and high - 1e-3 < t.max() < high
    torch.testing.assert_close(made.student.interpolant.time(timestep).float(), t)


def test_prompts_of_the_data_serve_without_templates(tiny_pipeline):
    made = objective(tiny_pipeline("sd15"), token="<it>", initializer="a")
    (loss,) = made.losses(PHASE, batch_of(2, prompts=["b <it>", "<it> c"]), ItemRNG(1, range(2)))
    assert loss.value.isfinite()
    with pytest.raises(ValueError, match="the data's prompts do not contain the token '<it>'; set objective.templates"):
        list(made.losses(PHASE, batch_of(2, prompts=["b <it>", "c"]), ItemRNG(1, range(2))))


def test_bad_input(tiny_pipeline):
    with pytest.raises(ValueError, match="must have {} once"):
        ZOODiPConfig(token="<it>", templates=["a photo"])
    with pytest.raises(ValueError, match=r"t_min=0.9 must be below t_max=0.5"):
        ZOODiPConfig(token="<it>", t_min=0.9, t_max=0.5)
    with pytest.raises(ValueError, match="the pipeline has no text encoder; leave them out"):
        objective(tiny_pipeline("dit"), token="1", templates=["{}"])
    with pytest.raises(ValueError, match="in whose place they must have {}"):
        objective(tiny_pipeline("sd15"), token="<it>", initializer="a", templates=["{} <it>"])
    with pytest.raises(ValueError, match="token='a' exists already"):
        objective(tiny_pipeline("sd15"), token="a", initializer="b", templates=["{}"])
