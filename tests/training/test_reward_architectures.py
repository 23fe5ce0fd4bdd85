"""Reward fine-tuning of every architecture: three updates of a LoRA, which plain Diffusers then loads."""

import pytest
import torch
from diffusers import DiffusionPipeline

from genkit.registry import members
from genkit.testing import tiny
from genkit.training import logs
from genkit.training.export import export
from genkit.training.objectives._reward import RewardObjective
from tests.rewards import tiny as models
from tests.training.ready import READY

CLIP, CLASSIFIER, FUNCTION = "clip_score", "classifier", "function"
BOTH, DETACHED = dict(guidance_scale=3.0), dict(guidance_scale=3.0, detach_unconditional=True)

# Architecture, strategy, its settings, the reward. FLUX's guidance is distilled into it.
RUNS = [
    ("sd15", "draft", dict(live_steps=None) | BOTH, CLIP),
    ("sdxl", "leapalign", dict(pairs="sample") | DETACHED, CLASSIFIER),
    ("sd3", "refl", BOTH, FUNCTION),
    ("flux", "draft_lv", dict(copies=1), CLIP),
]
SLOW = [
    ("sd15", "draft_lv", dict(copies=1) | DETACHED, FUNCTION),
    ("sd15", "refl", BOTH, CLASSIFIER),
    ("sdxl", "align_prop", dict(noise_scale=1.0) | BOTH, CLIP),
    ("sdxl", "drtune", dict(live_steps=2) | BOTH, FUNCTION),
    ("sd3", "draft", dict(live_steps=2, recompute=False), CLIP),
    ("sd3", "leapalign", dict(form="joint") | BOTH, CLASSIFIER),
    ("flux", "leapalign", dict(leaps=3), FUNCTION),
    ("flux", "drtune", dict(live_steps=2, early_stop=2), CLIP),
    ("flux", "align_prop", {}, CLASSIFIER),
]
# What no row names is run as ready.py has it.
NAMED = {run[1] for run in RUNS + SLOW}
OTHERS = sorted(set(members("genkit.training.objectives", RewardObjective)) - NAMED)
for one in OTHERS:
    own = dict(READY[one][0].objective) if one in READY else {}
    own = {key: value for key, value in own.items() if key not in ("rewards", "held_out")}
    RUNS.append(("sd15", one, own, FUNCTION))
    SLOW.append(("sd3", one, own, CLIP))
ALL = RUNS + [pytest.param(*run, marks=pytest.mark.slow) for run in SLOW]


def test_every_strategy_and_every_architecture_is_there_twice():
    strategies = set(members("genkit.training.objectives", RewardObjective))
    for k, names in enumerate(({"sd15", "sdxl", "sd3", "flux"}, strategies)):
        counts = {name: len({run[1 - k] for run in RUNS + SLOW if run[k] == name}) for name in names}
        assert min(counts.values()) >= 2, counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def base(folder):
    """The folder of a tiny pipeline, the pipeline, and what it draws."""
    made = {}

    def get(name):
        if name not in made:
            tiny.pipeline(name).save_pretrained(folder / name)
            pipe = DiffusionPipeline.from_pretrained(folder / name)
            pipe.set_progress_bar_config(disable=True)
            made[name] = folder / name, pipe, pipe(**tiny.call_arguments(name)).images
        return made[name]

    return get


@pytest.fixture(scope="module")
def rewards(folder):
    code = folder / "reward.py"
    code.write_text("def red(images):\n    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))\n")
    return {
        CLIP: dict(name="clip_score", model=models.clip(folder / "clip")),
        CLASSIFIER: dict(name="classifier", model=models.classifier(folder / "classifier"), wanted="dog"),
        FUNCTION: dict(name="function", path=f"{code}:red", differentiable=True),
    }


@pytest.mark.parametrize("name, strategy, settings, reward", ALL)
def test_the_adapter_changes_what_plain_diffusers_draws(
    name, strategy, settings, reward, base, rewards, toys, tmp_path
):
    path, pipe, images = base(name)
    watched = next(key for key in rewards if key != reward)
    trainer = toys.digits(
        tmp_path,
        model=dict(pretrained=str(path)),
        objective=dict(
            **dict(name=strategy, num_inference_steps=3) | settings,
            rewards=[rewards[reward]],
            held_out=[rewards[watched]],
        ),
        data=dict(name="prompts", prompts=["a cat", "two dogs", "a red hen"]),
        adapter=dict(kind="lora", rank=4, alpha=8),
        optimizer=dict(name="AdamW", lr=2e-2),
        lr_scheduler="constant",
        lr_warmup_steps=0,
        global_batch_size=2,
        max_train_steps=3,
        checkpointing_steps=3,
        logging_steps=1,
        ema=dict(decays=[0.1]),
    )
    names = list(trainer.roles["student"].parameters)
    assert names and all("lora" in n for n in names)
    toys.run(trainer)
    lines = logs.read(tmp_path / logs.FILE)
    assert len(lines) == 3 and all(line["dropped"] == 0 and line["grad_norm/student"] > 0 for line in lines)
    assert {f"reward/{rewards[key]['name']}" for key in (reward, watched)} < set(lines[0])
    assert lines[-1]["distance_from_base"] > 0 == lines[0]["distance_from_base"]

    pipe.load_lora_weights(export(trainer))
    changed = pipe(**tiny.call_arguments(name)).images
    pipe.unload_lora_weights()
    assert abs(changed - images).max() > 1e-3
    assert (pipe(**tiny.call_arguments(name)).images == images).all()
    assert torch.isfinite(torch.as_tensor(changed)).all()
