"""Stable Diffusion 3 by a fourth-order pseudo-numerical sampler: as many network calls as steps, and one.

python examples/pndm_on_sd3.py --prompt "a lighthouse in the fog" --steps 28 --output lighthouse.png
"""

import argparse

import torch
from diffusers import StableDiffusion3Pipeline

from genkit.schedulers import PseudoNumericalScheduler


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-3.5-medium")
    parser.add_argument("--prompt", default="a lighthouse in the fog")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--order", type=int, default=4, help="2 or 3 for fewer steps")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="pndm.png")
    args = parser.parse_args(arguments)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusion3Pipeline.from_pretrained(args.model, dtype=dtype).to(device)
    pipe.scheduler = PseudoNumericalScheduler.from_scheduler(pipe.scheduler, solver_order=args.order)
    image = pipe(
        args.prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        height=args.size,
        width=args.size,
        generator=torch.Generator(device).manual_seed(args.seed),
    ).images[0]
    image.save(args.output)


if __name__ == "__main__":
    main()
