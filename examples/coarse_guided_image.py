"""A coarse image, refined: a thumbnail, a blurred photograph or a crude edit goes in, what the model makes of it out.

python examples/coarse_guided_image.py thumbnail.png --prompt "a lighthouse in the fog" --output refined.png
"""

import argparse

import torch
from PIL import Image

from genkit.guidance.h_transform import HTransform
from genkit.pipelines import CoarseGuidedPipeline


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", help="of any size")
    parser.add_argument("--model", default="stabilityai/stable-diffusion-3.5-medium")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--exponent", type=float, default=5.0, help="larger follows the image less")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="refined.png")
    args = parser.parse_args(arguments)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = CoarseGuidedPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    guider = HTransform(exponent=args.exponent, rule={"name": "apg", "guidance_scale": args.guidance_scale})
    image = pipe(
        Image.open(args.image),
        args.prompt,
        num_inference_steps=args.steps,
        guider=guider,
        generator=torch.Generator(device).manual_seed(args.seed),
    ).images[0]
    image.save(args.output)


if __name__ == "__main__":
    main()
