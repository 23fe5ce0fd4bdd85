"""Feynman-Kac corrected guidance: eight weighted particles of the density that guidance only aims at, and one of them.

python examples/fkc_particles.py --prompt "a lighthouse in the fog" --particles 8 --output particles.png
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from genkit.feynman_kac import FKC
from genkit.pipelines import FeynmanKacPipeline


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--prompt", default="a lighthouse in the fog")
    parser.add_argument("--guidance-scale", type=float, default=1.4)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="particles.png")
    args = parser.parse_args(arguments)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = FeynmanKacPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    particles = FKC(args.particles, ess_threshold=0.5)
    out = pipe(
        args.prompt,
        num_inference_steps=args.steps,
        particles=particles,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator(device).manual_seed(args.seed),
    )
    print("weights", [round(weight, 3) for weight in out.weights[0].tolist()])
    print(f"log Z {out.log_z[0]:.2f}, chosen {out.chosen[0]}")
    print("effective sample size by step", [round(ess, 1) for ess in particles.stats()["ess"][:, 0].tolist()])
    make_image_grid(out.images, rows=1, cols=args.particles).save(args.output)


if __name__ == "__main__":
    main()
