"""An image by score distillation: Stable Diffusion tells a latent at every noise level how to look more like a prompt.

python examples/score_distillation.py --prompt "a lighthouse in the fog" --method vsd --output lighthouse.png
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from genkit.denoisers import from_pipeline
from genkit.latents import unstandardise
from genkit.rng import ItemRNG
from genkit.training.optimize_image import optimize_image
from genkit.training.parts.annealing import LinearSchedule


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--prompt", default="a lighthouse in the fog")
    parser.add_argument("--method", default="sds", choices=["sds", "csd", "vsd"])
    parser.add_argument("--guidance-scale", type=float, help="by default 100 for sds, 7.5 for vsd; csd takes none")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="distilled.png")
    args = parser.parse_args(arguments)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    denoiser = from_pipeline(pipe)
    with torch.no_grad():
        condition = denoiser.encode(pipe, prompt=[args.prompt], negative_prompt="")
    side = args.size // pipe.vae_scale_factor
    shape = (denoiser.module.config.in_channels, side, side)
    latents = optimize_image(
        denoiser,
        ItemRNG(args.seed, [0], device).normal(shape),
        condition,
        method=args.method,
        guidance_scale=args.guidance_scale,
        times=LinearSchedule(end=0.5),  # coarse at first, then fine
        num_steps=args.steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    with torch.no_grad():
        pixels = pipe.vae.decode(unstandardise(pipe.vae, latents).to(dtype), return_dict=False)[0]
    pipe.image_processor.postprocess(pixels.float())[0].save(args.output)


if __name__ == "__main__":
    main()
