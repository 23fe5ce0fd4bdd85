"""``genkit distill``: from a teacher and a method's name to a pipeline that loads in another process."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import nn
from typer.testing import CliRunner

from genkit import cli
from genkit.testing import tiny
from genkit.training.build import build
from genkit.training.card import usage
from genkit.training.config import TrainConfig
from genkit.training.distill import Recipe, _few_steps, choose, distill, recipes
from genkit.training.few_steps import STEPS
from genkit.training.memory import footprints, optimizer_states
from genkit.training.sections import Named

SMALL = ["global_batch_size=2", "gradient_accumulation_steps=1", "checkpointing_steps=2", "ema.decays=[0.5]"]
RANK = ["adapter.rank=2", "adapter.alpha=2"]
GAN = ["objective.gan.hidden_size=8", "objective.gan.norm_num_groups=2", "objective.gan.num_layers=1"]
DMD2 = {
    "sd15": ("StableDiffusionPipeline", "RenoiseScheduler", (1,)),
    "sdxl": ("StableDiffusionXLPipeline", "RenoiseScheduler", (1, 2, 4)),
}
ROUNDS = ["rounds.count=1", "rounds.grid.beta=[0.05]", "rounds.num_fakes=4", "rounds.num_samples=2"]
ROUNDS += ["rounds.num_inference_steps=1", "rounds.batch_size=2", "rounds.evaluate_every=2"]

# teacher, method, adapter, data, further settings, class that is saved, scheduler, numbers of steps it takes
RUNS = {
    "digits-mdt": ("digits", "mdt", None, None, [], "ClassConditionalPipeline", "RenoiseScheduler", STEPS),
    "digits-lsd-lora": (
        "digits",
        "lsd",
        "lora",
        "synthetic",
        RANK,
        "ClassConditionalPipeline",
        "FlowMapScheduler",
        STEPS,
    ),
    "sd15-lsd": ("sd15", "lsd", None, "synthetic", RANK, "FewStepPipeline", "FlowMapScheduler", STEPS),
    "dit-psd_m": ("dit", "psd_m", "full", "synthetic", [], "FewStepPipeline", "FlowMapScheduler", STEPS),
    "sd15-mdt": ("sd15", "mdt", "full", "synthetic", [], "StableDiffusionPipeline", "RenoiseScheduler", STEPS),
    "sd3-mdt": ("sd3", "mdt", None, "synthetic", RANK, "StableDiffusion3Pipeline", "RenoiseScheduler", STEPS),
    "sd3-dmd": ("sd3", "dmd", None, "prompts", RANK, "StableDiffusion3Pipeline", "RenoiseScheduler", (1,)),
    "flux-lsd": ("flux", "lsd", "lora", "synthetic", RANK, "FewStepPipeline", "FlowMapScheduler", STEPS),
    "flux-apex": ("flux", "apex", "lora", "synthetic", RANK, "FewStepPipeline", "FlowMapScheduler", STEPS),
    "sdxl-meanflow": ("sdxl", "meanflow", "lora", "synthetic", RANK, "FewStepPipeline", "FlowMapScheduler", STEPS),
    "dit-meanflow": ("dit", "meanflow", "full", "synthetic", [], "FewStepPipeline", "FlowMapScheduler", STEPS),
    "sd3-apex": ("sd3", "apex", "lora", "synthetic", RANK, "FewStepPipeline", "FlowMapScheduler", STEPS),
    "sd15-dmd2": ("sd15", "dmd2", "lora", "synthetic", [*RANK, *GAN], *DMD2["sd15"]),
    "sdxl-dmd2": ("sdxl", "dmd2", "lora", "synthetic", [*RANK, *GAN, "objective.gan.stride=1"], *DMD2["sdxl"]),
    "sdxl-ddo": (
        "sdxl",
        "ddo",
        "lora",
        "synthetic",
        [*RANK, *ROUNDS],
        "StableDiffusionXLPipeline",
        "EulerDiscreteScheduler",
        STEPS,
    ),
    "dit-ddo": (
        "dit",
        "ddo",
        "full",
        "synthetic",
        [*ROUNDS, "rounds.grid.alpha=[1.0]", "data.num_classes=2"],
        "DiTPipeline",
        "DDIMScheduler",
        STEPS,
    ),
}


@pytest.fixture(scope="module")
def teachers(toys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    found = {}
    for name in ("sd15", "sdxl", "sd3", "flux", "dit"):
        found[name] = folder / name
        tiny.pipeline(name).save_pretrained(found[name])
    trainer = toys.digits(folder / "digits", max_train_steps=2, checkpointing_steps=2)
    trainer.train()
    from genkit.training.export import export

    return found | {"digits": export(trainer)}


@pytest.fixture(scope="module")
def students(teachers, tmp_path_factory):
    """Every run of the table, as a command; the text that each printed."""
    folder = tmp_path_factory.mktemp("students")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\na dog\n\na lighthouse\n")
    printed = {}
    for name, (teacher, method, adapter, data, more, *_) in RUNS.items():
        arguments = ["distill", str(teachers[teacher]), "--method", method, "--output", str(folder / name)]
        arguments += ["--steps", "2", *SMALL, *more]
        arguments += [] if adapter is None else ["--adapter", adapter]
        arguments += [] if data is None else ["--data", str(prompts) if data == "prompts" else data]
        AcceleratorState._reset_state()
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, f"{name}: {done.output}"
        printed[name] = done.output
    return folder, printed


CHILD = """
import json, sys, torch
torch.set_num_threads(1)
import genkit
from diffusers import DiffusionPipeline
from genkit.pipelines import ClassConditionalPipeline, FewStepPipeline
from genkit.testing import tiny

found = {}
for name, (folder, cls, steps) in json.loads(sys.argv[1]).items():
    own = {c.__name__: c for c in (ClassConditionalPipeline, FewStepPipeline)}
    pipe = own.get(cls, DiffusionPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == cls
    for n in steps:
        if name.startswith(("digits", "dit")):
            noise = torch.manual_seed(0)
            arguments = dict(class_labels=[1], num_inference_steps=n, output_type="np", generator=noise)
        else:
            arguments = tiny.call_arguments(name.split("-")[0], n)
        if cls not in own:
            arguments["guidance_scale"] = 1.0
        images = pipe(**arguments).images
        found.setdefault(name, []).append([list(images.shape), bool((images == images).all())])
print(json.dumps({"found": found, "scheduler": type(pipe.scheduler).__module__}))
"""


def test_students_load_in_another_process_and_draw(students):
    folder, _ = students
    asked = {
        name: (str(folder / name / "pipeline"), cls, [n for n in (1, 4) if n in steps])
        for name, (*_, cls, _scheduler, steps) in RUNS.items()
    }
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(asked)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["found"]
    for name, (_, _, steps) in asked.items():
        shape = [1, 8, 8, 1] if name.startswith("digits") else [1, 32, 32, 3]
        assert found[name] == [[shape, True]] * len(steps), name


@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved(name, students):
    folder, printed = students
    _, method, _, data, _, cls, scheduler, steps = RUNS[name]
    index = json.loads((folder / name / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == cls and index["scheduler"][1] == scheduler
    rows = json.loads((folder / name / "few_steps.json").read_text())
    assert [row["steps"] for row in rows] == list(steps) and all(row["network_calls"] == row["steps"] for row in rows)
    card = (folder / name / "pipeline" / "README.md").read_text()
    assert usage(folder / name / "pipeline", _few_steps(folder / name / "pipeline")) in card and f"- {method}" in card
    for row in rows:
        assert f"network_calls ({row['steps']} steps)" in card
        known = {"frechet_distance", "class_accuracy", "recall"}
        assert known & set(row) == (known if data is None else set())  # no number without an extractor
        assert ("saturation" in row) == (data != "prompts")
    text = printed[name]
    assert f"{method} by configs/" in text and "in all, without activations" in text and "2 steps of 2 items" in text
    assert "student" in text and str(folder / name / "pipeline") in text


def test_network_calls_are_counted(students):
    """Velocity matching calls the student twice, velocity distillation three times; guidance doubles the teacher's.

    Under mixed precision the value that velocity matching takes a difference of is made once more, in full precision.
    """
    _, printed = students
    for name, calls in {"digits-mdt": (5, 2), "sd3-mdt": (6, 4)}.items():
        for role, n in zip(("student", "teacher"), calls, strict=True):
            assert f"network calls in training, an item ({role}): {n}\n" in printed[name]


def test_the_student_is_the_average_and_lora_is_fused(students, teachers):
    """What is saved has no adapter, and differs from the teacher exactly where something was trained."""
    from safetensors.torch import load_file

    folder, _ = students

    def network(path, part):
        return load_file(path / part / "diffusion_pytorch_model.safetensors")

    for name, teacher, part in (("sd3-mdt", "sd3", "transformer"), ("sd15-lsd", "sd15", "unet")):
        before, after = network(teachers[teacher], part), network(folder / name / "pipeline", part)
        assert set(before) == set(after)
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert moved and all(any(t in k for t in ("to_q", "to_k", "to_v", "to_out")) for k in moved)
    lora = folder / "sd3-mdt" / "lora" / "pytorch_lora_weights.safetensors"
    assert lora.is_file()  # beside it, in the form that is shared


def test_run_again_it_goes_on(teachers, tmp_path):
    """What was trained is not trained again, and a longer run goes on from it."""
    arguments = dict(overrides=SMALL, data="synthetic", quiet=True)
    distill(str(teachers["digits"]), "mdt", tmp_path, steps=2, **arguments)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    distill(str(teachers["digits"]), "mdt", tmp_path, steps=2, **arguments)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    distill(str(teachers["digits"]), "mdt", tmp_path, steps=4, **arguments)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before) and (tmp_path / "checkpoint-4").is_dir()


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_a_new_recipe_is_a_new_method(tmp_path):
    for i, section in enumerate(({"method": "new"}, {"method": "new", "pipelines": ["B"]}, None)):
        recipe = {"objective": {"name": "flow_map"}} | ({} if section is None else {"distill": section})
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(recipe))
    known = recipes(tmp_path)
    assert known == [Recipe("new", (), tmp_path / "0.yaml"), Recipe("new", ("B",), tmp_path / "1.yaml")]
    assert choose(known, "new", "A").path.name == "0.yaml" and choose(known, "new", "B").path.name == "1.yaml"
    with pytest.raises(ValueError, match="method='new' has no recipe for the teacher's A; there are recipes for B"):
        choose(known[1:], "new", "A")


def test_the_methods_of_the_package():
    from importlib import resources

    known = recipes(resources.files("genkit.configs"))
    assert {"lsd", "esd", "psd_m", "psd_u", "mdt"} <= {r.method for r in known}
    pairs = [(r.method, p) for r in known for p in r.pipelines or ("any",)]
    assert len(pairs) == len(set(pairs))  # one recipe for a method and a pipeline


def error(teacher, method, folder, *more):
    AcceleratorState._reset_state()
    arguments = ["distill", str(teacher), "--method", method, "--output", str(folder / "out"), *more]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1 and not (folder / "out").exists()
    return done.stderr


def test_errors_come_before_any_work(teachers, tmp_path):
    digits, sd15 = teachers["digits"], teachers["sd15"]
    assert "method='meanfow' is not known; did you mean 'meanflow'?" in error(digits, "meanfow", tmp_path)
    assert "is neither a pipeline folder nor a name (owner/name) on the Hub" in error(
        tmp_path / "nothing", "lsd", tmp_path
    )
    assert "path='data/pictures' is not a folder" in error(sd15, "lsd", tmp_path)
    assert "gives no samples, which objective='flow_map' needs" in error(
        sd15, "lsd", tmp_path, "--data", "prompts", "data.prompts=[a]"
    )
    text = error(sd15, "lsd", tmp_path, "--data", "synthetic", "adapter.target_modules=[to_qq]")
    assert "adapter.target_modules='to_qq' matches no layer of UNet2DConditionModel" in text
    assert "adapter.kind='dora'" in error(digits, "lsd", tmp_path, "--adapter", "dora")
    assert "max_train_steps=0" in error(digits, "lsd", tmp_path, "--steps", "0")
    assert "unknown key in objective: key='vd_wieght'" in error(digits, "mdt", tmp_path, "objective.vd_wieght=1")


def test_a_teacher_off_the_path(teachers, tmp_path):
    """Rectified flow's student is on the linear path, Stable Diffusion 1.5 is not."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    text = error(teachers["sd15"], "rectified_flow", tmp_path, "--data", str(prompts))
    assert "DiscreteVP" in text


# -- memory -----------------------------------------------------------------------------------------------------------


def test_footprints(toys, tmp_path):
    settings = toys.settings(tmp_path, ema=dict(decays=[0.9, 0.5]))
    run = build(TrainConfig(**settings).check())
    (student,) = footprints(run)
    n = sum(p.numel() for p in run.student.module.parameters())
    assert (student.role, student.parameters, student.trained) == ("student", n, n)
    buffers = sum(b.numel() * b.element_size() for b in run.student.module.buffers())
    assert student.weights == 4 * n + buffers
    assert (student.gradients, student.optimizer, student.averages) == (4 * n, 8 * n, 8 * n)
    assert student.total == student.weights + 20 * n


def test_footprints_of_a_lora_and_what_is_frozen(teachers, tmp_path):
    base = dict(
        output_dir=tmp_path,
        model=dict(pretrained=str(teachers["sd3"])),
        teacher=str(teachers["sd3"]),
        adapter=dict(kind="lora", rank=2, alpha=2),
        objective=dict(name="flow_map", loss="psd_m"),
        data=dict(name="synthetic"),
        optimizer=dict(name="SGD", lr=1e-2),
        global_batch_size=2,
        max_train_steps=1,
    )
    run = build(TrainConfig(**base).check())
    student, teacher, other = footprints(run)
    assert 0 < student.trained < student.parameters and student.gradients == 4 * student.trained
    assert student.optimizer == 0  # SGD without momentum
    assert (teacher.role, teacher.trained, teacher.gradients + teacher.optimizer + teacher.averages) == (
        "teacher",
        0,
        0,
    )
    assert other.role == "other parts" and other.weights > 0 == other.trained
    assert isinstance(run.pipe.vae, nn.Module)


@pytest.mark.parametrize(
    "settings, numbers",
    [(dict(name="AdamW"), 2), (dict(name="SGD", momentum=0.9), 1), (dict(name="Adagrad"), 1), (dict(name="SGD"), 0)],
)
def test_optimizer_states(settings, numbers):
    assert optimizer_states(Named(**(dict(lr=1e-3) | settings))) == numbers
