"""Tiny pipelines built from configurations: nothing is downloaded, a call takes a fraction of a second.

Every weight is random and seeded. They make no pictures; they have the wiring, the file formats and the numerics of the
real models, which is what a plug-in's tests need.

>>> from genkit.testing import tiny
>>> pipe = tiny.pipeline("sd3")
>>> images = pipe(**tiny.call_arguments("sd3")).images
"""

import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from genkit.registry import unknown

IMAGE_SIZE = 32
LATENT_SIZE = 16
_CHARACTERS = [c for c in string.printable if not c.isspace()]


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over the 94 printable characters, without merges: a token a character."""
    # Through files, because the constructor's arguments changed between transformers 4 and 5 and the formats did not.
    tokens = [*_CHARACTERS, *(c + "</w>" for c in _CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = models.BPE({token: i for i, token in enumerate(tokens)}, [])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        Path(folder, "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A T5-like tokenizer over the 94 printable characters; ``</s>`` ends a text."""
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    )


def _clip_encoder(tokenizer, cls=CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config)


def _t5_encoder(tokenizer, d_model: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=d_model,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return T5EncoderModel(config)


def _vae(**settings) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        **settings,
    )


def _flow_vae() -> AutoencoderKL:
    return _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)


_UNET = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    norm_num_groups=4,
    attention_head_dim=(2, 4),
)


def _unet(**settings) -> UNet2DConditionModel:
    up_blocks = ("CrossAttnUpBlock2D", "UpBlock2D")
    return UNet2DConditionModel(sample_size=LATENT_SIZE, up_block_types=up_blocks, **_UNET, **settings)


_STABLE_DIFFUSION_NOISE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
)


def _sd15_components() -> dict:
    tokenizer = clip_tokenizer()
    return dict(
        vae=_vae(),
        text_encoder=_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=32),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **_STABLE_DIFFUSION_NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**_sd15_components())


def _sd15_controlnet() -> StableDiffusionControlNetPipeline:
    components = _sd15_components()
    controlnet: Any = ControlNetModel(cross_attention_dim=32, conditioning_embedding_out_channels=(8, 16), **_UNET)
    # Its output convolutions are born zero: without this the control image would change nothing.
    zero_born = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
    for layer in (*zero_born, controlnet.controlnet_cond_embedding.conv_out):
        layer.reset_parameters()
    return StableDiffusionControlNetPipeline(controlnet=controlnet, **components)


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip_encoder(tokenizer),
        text_encoder_2=_clip_encoder(tokenizer_2, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 1),
        ),
        scheduler=EulerDiscreteScheduler(**_STABLE_DIFFUSION_NOISE),
        add_watermarker=False,
    )


def _sd3() -> StableDiffusion3Pipeline:
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=_flow_vae(),
        text_encoder=_clip_encoder(tokenizer, CLIPTextModelWithProjection),
        text_encoder_2=_clip_encoder(tokenizer_2, CLIPTextModelWithProjection),
        text_encoder_3=_t5_encoder(tokenizer_3, d_model=64),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        transformer=SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> FluxPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        vae=_flow_vae(),
        text_encoder=_clip_encoder(tokenizer),
        text_encoder_2=_t5_encoder(tokenizer_2, d_model=32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _dit() -> DiTPipeline:
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
            attention_bias=True,
            activation_fn="gelu-approximate",
        ),
        vae=_vae(),
        scheduler=DDIMScheduler(clip_sample=False),
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "sd15": _sd15,
    "sd15_controlnet": _sd15_controlnet,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "dit": _dit,
}
NAMES = tuple(_BUILDERS)


def pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """Build the tiny pipeline ``name`` on the CPU in float32, in eval mode.

    Args:
        name: one of ``tiny.NAMES``.
        seed: of the weights. The global random state is neither read nor moved.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(unknown("name", name, NAMES))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        pipe = _BUILDERS[name]()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipe


def call_arguments(name: str, num_inference_steps: int = 2, seed: int = 0, *, guided: bool = False) -> dict:
    """Arguments with which ``pipeline(name)`` can be called: one image of 32 x 32, as a NumPy array.

    ``guided`` adds what makes every pipeline evaluate both branches, as :func:`genkit.guidance.guided` needs it: Flux
    does so for a negative prompt and a true scale of guidance only.
    """
    if name not in _BUILDERS:
        raise ValueError(unknown("name", name, NAMES))
    arguments: dict = dict(
        num_inference_steps=num_inference_steps, generator=torch.Generator().manual_seed(seed), output_type="np"
    )
    if name == "dit":
        return arguments | dict(class_labels=[1])
    arguments |= dict(prompt="a cat", height=IMAGE_SIZE, width=IMAGE_SIZE)
    if name in ("sd3", "flux"):
        arguments |= dict(max_sequence_length=16)
    if guided and name == "flux":
        arguments |= dict(true_cfg_scale=2.0, negative_prompt="")
    if name == "sd15_controlnet":
        arguments |= dict(image=torch.linspace(0, 1, 3 * IMAGE_SIZE**2).view(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return arguments
