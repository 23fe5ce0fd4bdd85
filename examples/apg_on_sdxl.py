"""Adaptive projected guidance on SDXL: a strong scale without burnt colours, by one line around the pipeline's call.

python examples/apg_on_sdxl.py --prompt "a lighthouse in the fog" --output lighthouse.png
"""

import argparse

import torch
from diffusers import StableDiffusionXLPipeline

import genkit
from genkit.guidance import APG


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--prompt", default="a lighthouse in the fog")
    parser.add_argument("--guidance-scale", type=float, default=15.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="apg.png")
    args = parser.parse_args(arguments)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionXLPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    # What is projected out, bounded and remembered is in APG's docstring; these are the paper's values for SDXL.
    guider = APG(guidance_scale=args.guidance_scale, norm_threshold=15.0, momentum=-0.5, eta=0.0)
    with genkit.guided(pipe, guider):
        image = pipe(
            args.prompt,
            guidance_scale=5.0,  # any above 1: that the pipeline makes both predictions is all it decides here
            num_inference_steps=args.steps,
            generator=torch.Generator(device).manual_seed(args.seed),
        ).images[0]
    image.save(args.output)


if __name__ == "__main__":
    main()
