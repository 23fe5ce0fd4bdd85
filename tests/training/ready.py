"""What the tests over all objectives must be told of each; there is no other list.

``READY[name]`` is a list of cases, so that a method's branches can each have one.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A way to train by an objective.

    Args:
        objective: settings beside the name.
        falls: ``(key, ratio)``: in 60 steps on digits, from a teacher of 200 steps, the logged value falls below this
            ratio of its start (means of ten). Settings of a run that differ for this test stand in ``learns``.
        teacher: whether the run has one where the method could do without.
        paths: on which ``prediction types`` are compared, of ``linear`` and ``vp``; empty for a method whose loss does
            not involve the teacher's predictions.
        run: settings of the run beside the objective.
    """

    objective: dict[str, Any] = field(default_factory=dict)
    falls: tuple[str, float] = ("loss", 1.0)
    teacher: bool = False
    paths: tuple[str, ...] = ("linear", "vp")
    run: dict[str, Any] = field(default_factory=dict)
    learns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A way of a strategy of reward fine-tuning, tried in closed form on a rollout of six calls.

    Args:
        settings: beside rewards and rollout.
        calls: of the network in a step, where that is known.
        mean: settings under which the first loss is the mean over the samples, times ``share``.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    calls: range | None = None
    mean: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0


# For what has little left to learn from the weights of a teacher.
ANEW = dict(model=dict(network="dit", hidden_size=16, num_layers=1, num_heads=2))

# Digits and noise as the pairs of one source: what methods on pairs are given here.
COUPLED = dict(data=dict(name="transfer", x0=dict(name="digits"), eps=dict(name="synthetic", shape=[1, 8, 8])))

# Noise cut to [-1, 1]; whole noise, or two grey levels, as fakes.
FAKES = dict(data=dict(name="synthetic", shape=(1, 8, 8), num_classes=10, fields={"fake": dict(shape=(1, 8, 8))}))
GREYS = dict(data=FAKES["data"] | dict(fields={"fake": dict(shape=(1, 8, 8), high=2)}))
# Noise cut to [-1, 1] is preferred to whole noise; verdicts by the toss of a coin.
CHOICES = dict(data=FAKES["data"] | dict(fields={"lose": dict(shape=(1, 8, 8))}))
VERDICTS = dict(data=FAKES["data"] | dict(fields={"score": dict(high=2)}))
TOKENS = dict(network="gpt", hidden_size=16, num_layers=1, num_heads=2, dropout=0.0)
MASKED = dict(network="mar", hidden_size=16, num_layers=1, num_heads=2, head_width=16, head_layers=1, dropout=0.0)


def small_tokenizer(**quantizer) -> dict[str, Any]:
    """Digits as 4 x 4 tokens."""
    sizes = dict(in_channels=1, out_channels=1, sample_size=8, block_out_channels=[8, 16], layers_per_block=1)
    return dict(network="tokenizer", latent_channels=8, norm_num_groups=4, quantizer=quantizer, **sizes)


# A generator that hardly moves, so that what follows it can be seen to.
STILL = dict(optimizer=dict(name="AdamW", lr=1e-5))

ASKED = dict(data=dict(name="prompts", num_classes=10))


def threes(**settings) -> dict[str, Any]:
    """Every digit to become a three, as one classifier sees it and another one watches."""
    reward = dict(name="digits", wanted=3)
    held_out = reward | dict(network="held_out", label="held_out")
    return dict(num_inference_steps=4, rewards=[reward], held_out=[held_out]) | settings


READY: dict[str, list[Case]] = {
    "d3sr": [
        Case(
            dict(adversarial=dict(head=dict(hidden_size=16, norm_num_groups=4), lora=dict(rank=2))),
            falls=("mse/generator", 0.8),
            paths=(),
            run=dict(
                data=dict(
                    name="super_resolution",
                    source=dict(name="digits"),
                    degradation=dict(kind="resize", filter="area"),
                )
            ),
        )
    ],
    "align_prop": [
        Case(threes(noise_scale=1.0, loss=dict(kind="target", value=0.0)), falls=("loss", 0.7), paths=(), run=ASKED),
        Case(threes(first_live=dict(law="uniform")), falls=("loss", 0.7), paths=(), run=ASKED),
    ],
    "autoregressive": [Case(falls=("loss", 0.97), run=dict(model=TOKENS))],
    "ddo": [
        Case(dict(alpha=2.0, beta=0.02), falls=("loss", 0.9), run=FAKES, learns=dict(max_train_steps=90)),
        Case(
            dict(error="flow_prediction", times=dict(law="uniform", low=0.1, high=0.9)),
            falls=("loss", 0.9),
            run=FAKES,
            teacher=True,
        ),
    ],
    "ddo_autoregressive": [
        Case(dict(alpha=1.0), falls=("loss", 0.97), run=dict(model=TOKENS)),
        Case(dict(fakes="stored", alpha=1.0), falls=("loss", 0.97), run=GREYS | dict(model=TOKENS)),
    ],
    "diffusion_dpo": [
        Case(dict(beta=20.0, max_rise=None), falls=("loss", 0.9), run=CHOICES),
        Case(
            dict(error="flow_prediction", same_noise=False, beta=20.0, max_rise=None),
            falls=("loss", 0.95),
            run=CHOICES | dict(gradient_accumulation_steps=2),
            teacher=True,
        ),
    ],
    "dro": [
        Case(
            dict(feedback=dict(kind="scores", max_weight=1), form=dict(kind="clip", negative_weight=0.5)),
            falls=("err_w", 0.9),
            run=VERDICTS,
            learns=ANEW,
        ),
        Case(dict(feedback=dict(kind="scores", max_weight=1), form=dict(kind="sft")), ("loss", 0.9), run=VERDICTS),
        Case(
            dict(
                feedback=dict(kind="pairs"),
                form=dict(kind="softplus", beta=20.0, max_rise=None),
                error="flow_prediction",
            ),
            falls=("loss", 0.9),
            run=CHOICES,
            teacher=True,
        ),
        Case(
            dict(feedback=dict(kind="pairs"), form=dict(kind="plain", negative_weight=0.3, max_rise=None)),
            falls=("err_w", 0.95),
            run=CHOICES,
        ),
    ],
    "apex": [
        Case(
            dict(loss=dict(form="released", guidance=dict(guidance_scale=2.0, ema_decay=0.9), clamp=10, error="mse")),
            falls=("adversarial", 0.95),
            learns=ANEW,
        ),
        Case(
            dict(
                loss=dict(form="released", guidance=None, clamp=10, error="mse", parts=["mul", "adv"], dm_weight=0),
                shift=dict(kind="condition", form="diag", learned=True),
            ),
            falls=("flow", 0.9),
            run=dict(gradient_accumulation_steps=2),
            learns=ANEW,
        ),
        Case(dict(loss=dict(form="literal", warmup=0.5), shift=dict(kind="time_sign")), ("mixed", 0.6), learns=ANEW),
    ],
    "draft": [
        Case(threes(live_steps=None, guidance_scale=2.0), falls=("loss", 0.7), paths=(), run=ASKED),
        Case(
            threes(live_steps=2, noise_scale=1.0, prior_weight=1.0, micro_batch=3),
            falls=("loss", 0.7),
            paths=(),
            run=ASKED | dict(adapter=dict(kind="lora", rank=4, alpha=4)),
            learns=dict(optimizer=dict(name="AdamW", lr=2e-2)),
        ),
    ],
    "draft_lv": [
        Case(threes(), falls=("loss", 0.7), paths=(), run=ASKED),
        Case(
            threes(copies=1, reduction="sum", guidance_scale=2.0, detach_unconditional=True),
            falls=("loss", 0.7),
            paths=(),
            run=ASKED | dict(gradient_accumulation_steps=2),
        ),
    ],
    "drtune": [
        Case(threes(live_steps=2, early_stop=2), falls=("loss", 0.7), paths=(), run=ASKED),
        # Threes are punished, by log-probabilities, which are negative.
        Case(
            threes(rewards=[dict(name="digits", wanted=3, weight=-1)], normalise="running"),
            falls=("reward/digits", 1.5),
            paths=(),
            run=ASKED,
        ),
    ],
    "flow_matching": [Case(falls=("loss", 0.9), learns=ANEW)],
    "flow_map": [
        Case(dict(loss="lsd", diagonal_fraction=0.5), falls=("loss", 0.9), learns=ANEW),
        Case(dict(loss="psd_u"), falls=("loss", 0.9), learns=ANEW, run=dict(gradient_accumulation_steps=2)),
        Case(dict(loss="esd", guidance_scale=2.0, jvp="func"), falls=("off_diagonal", 0.9), teacher=True),
        Case(dict(loss="psd_m", diagonal_fraction=0.25), falls=("off_diagonal", 0.7), teacher=True),
    ],
    "leapalign": [
        Case(threes(), falls=("loss", 0.7), paths=(), run=ASKED),
        Case(
            threes(pairs="sample", leaps=3, similarity_weight=False, loss=dict(kind="hinge", threshold=-0.1)),
            falls=("loss", 0.7),
            paths=(),
            run=ASKED | dict(gradient_accumulation_steps=2),
        ),
        Case(threes(form="joint", guidance_scale=2.0), falls=("loss", 0.7), paths=(), run=ASKED),
    ],
    "readout": [
        Case(
            dict(kind="spatial", modules=["sample", "blocks.0.fc2"], projection_dim=48, norm_num_groups=4),
            falls=("loss", 0.7),
            paths=(),
        )
    ],
    "improved_mean_flow": [
        Case(
            dict(weight_power=0.0, guidance_scale=dict(high=4.0)),
            falls=("loss", 0.9),
            learns=ANEW | dict(max_train_steps=90),
        ),
        Case(dict(jvp="func", weight_power=0.0), falls=("loss", 0.9), teacher=True, learns=ANEW),
    ],
    "marginal_transport": [
        Case(dict(vm_guidance_scale=[1.0, 2.0]), falls=("loss", 0.8), teacher=True, learns=ANEW),
        Case(dict(vd_weight=0.0, jvp="func", derivative_norm=dict(relative=True)), falls=("loss", 0.95), learns=ANEW),
        Case(dict(vd_weight=0.0, eta=0.0, consistency_phases=2), falls=("loss", 0.8), teacher=True, learns=ANEW),
    ],
    "masked_autoregressive": [
        Case(falls=("loss", 0.97), run=dict(model=MASKED)),
        Case(
            dict(mask_min=0.05, mask_std=0.5, diffusion_batch_mul=2),
            falls=("loss", 0.97),
            run=dict(model=MASKED, gradient_accumulation_steps=2),
        ),
    ],
    "mean_flow": [
        Case(dict(weight_power=0.0, guidance_scale=2.0, guidance_mix=0.5), falls=("loss", 0.9), learns=ANEW),
        Case(dict(jvp="dual", order="v1", weight_power=0.0), falls=("loss", 0.9), teacher=True, learns=ANEW),
    ],
    "rectified_diffusion": [
        Case(falls=("loss", 0.9), learns=ANEW, run=COUPLED),
        Case(dict(space="epsilon", huber_c=None), falls=("loss", 0.9), learns=ANEW, run=COUPLED),
    ],
    # On the linear path a phase begins at alpha = 0, where an epsilon teacher says nothing of the clean sample.
    "rectified_diffusion_phased": [Case(dict(guidance_scale=1.0), falls=("loss", 0.9), learns=ANEW, paths=("vp",))],
    "rectified_flow": [
        Case(dict(coupling=dict(kind="pairs")), falls=("loss", 0.9), learns=ANEW, run=COUPLED),
        # Its student is on the linear path, where its teacher's flow begins at alpha = 0.
        Case(
            dict(coupling=dict(kind="teacher", num_steps=3), times=dict(law="grid")),
            falls=("loss", 0.9),
            learns=ANEW,
            teacher=True,
            paths=(),
        ),
    ],
    "scm": [
        Case(dict(tangent_warmup_steps=0), falls=("tangent", 0.95), teacher=True),
        Case(dict(jvp="finite_difference", learned_weight=False), falls=("tangent", 0.95)),
    ],
    "refl": [
        Case(threes(), falls=("loss", 0.7), paths=(), run=ASKED),
        Case(threes(first=1, last=2, recompute=True), falls=("loss", 0.7), paths=(), run=ASKED),
    ],
    "tokenizer": [
        Case(
            dict(perceptual=dict(kind="laplacian", weight=0.1)),
            falls=("reconstruction", 0.6),
            run=dict(model=small_tokenizer(kind="fvq", codebook_size=64, dim=8, width=16)),
        ),
        # Codes that are averages; a discriminator that begins within the run, weighed anew in every batch.
        Case(
            dict(
                pixel_loss="l1",
                adversarial=dict(
                    weight=0.1,
                    start=2,
                    adaptive=True,
                    lecam_weight=0.05,
                    discriminator=dict(kind="patch", num_filters=4, num_layers=1, norm="group"),
                    augment=["color", "translation", "cutout"],
                ),
            ),
            falls=("reconstruction/generator", 0.8),
            run=dict(
                model=small_tokenizer(
                    kind="vq", codebook_size=32, dim=4, rule="ema", kmeans_init=True, restart_threshold=0.5
                )
            ),
        ),
        # Quantizers of what others leave.
        Case(
            dict(
                adversarial=dict(
                    loss="non_saturating",
                    discriminator=dict(kind="patch", num_filters=4, num_layers=1, norm="none"),
                    optimizer=dict(lr=1e-3),
                )
            ),
            falls=("reconstruction/generator", 0.8),
            run=dict(
                model=small_tokenizer(
                    kind="residual", dim=4, depth=2, quantizer=dict(kind="simvq", codebook_size=32, freeze=True)
                ),
                gradient_accumulation_steps=2,
            ),
        ),
    ],
    "so_flow": [
        Case(dict(guidance_scale=2.0, guidance_mix=0.5), falls=("diagonal", 0.9), learns=ANEW),
        Case(dict(weight_power=0.0), falls=("loss", 0.9), teacher=True, learns=ANEW),
    ],
    "score_distillation": [
        Case(
            dict(
                gan=dict(at=["blocks.0"], hidden_size=16, num_layers=1, norm_num_groups=4, optimizer=dict(lr=2e-2)),
                fake=dict(kind="full", repeats=2),
            ),
            falls=("discriminator/fake", 0.97),
            learns=STILL,
            paths=(),
        ),
        Case(
            dict(method="sds", form="recon", times=dict(schedule="linear", end=0.5)),
            falls=("gradient", 0.9),
        ),
        Case(
            dict(method="vsd", fake=dict(kind="lora", optimizer=dict(lr=1e-2)), timesteps=[1000, 500]),
            falls=("loss/fake", 0.97),
            learns=STILL,
            paths=(),
        ),
    ],
    # Threes become noise. Differences of losses are divided by the step, and rounding with them: it is large here.
    "zoodip": [
        Case(
            dict(token="3", step=0.05, num_directions=8, subspace=dict(window=8, release_every=2)),
            falls=("loss", 0.9),
            paths=(),
            run=FAKES | dict(optimizer=dict(name="Adam", lr=0.1, eps=1e-3), max_grad_norm=None),
        ),
        Case(
            dict(
                token="3",
                step=0.05,
                central=True,
                quantization="none",
                subspace=dict(window=16, projection="drop_tail"),
            ),
            falls=("loss", 0.9),
            paths=(),
            run=FAKES
            | dict(optimizer=dict(name="Adam", lr=0.1, eps=1e-3), max_grad_norm=None, gradient_accumulation_steps=2),
        ),
    ],
}

# Strategies of reward fine-tuning; one that is not here is tried with its default settings.
VARIANTS: dict[str, list[Variant]] = {
    "align_prop": [
        Variant(calls=range(6, 7)),
        Variant(dict(noise_scale=1.0, first_live=dict(law="uniform")), calls=range(6, 7)),
    ],
    "draft": [Variant(dict(live_steps=None), calls=range(6, 7)), Variant(dict(live_steps=3), calls=range(6, 7))],
    # The sample, and two copies of it.
    "draft_lv": [Variant(calls=range(8, 9), share=1 / 3)],
    "drtune": [
        Variant(dict(live_steps=2, early_stop=3), calls=range(1, 7)),
        Variant(dict(live_steps=2, noise_scale=1.0), calls=range(1, 7)),
    ],
    "leapalign": [
        Variant(calls=range(8, 9), mean=dict(similarity_weight=False)),
        Variant(dict(pairs="sample"), calls=range(8, 9), mean=dict(similarity_weight=False)),
        Variant(dict(form="joint", leaps=3), calls=range(6, 7), mean=dict(similarity_weight=False)),
    ],
    "refl": [Variant(dict(first=2), calls=range(1, 7))],
}
