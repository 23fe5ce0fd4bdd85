"""Gradient-free classifier guidance: a class-conditional DiT, steered away from what a ViT takes its images for.

python examples/gfcg_class_conditional.py --labels 207 360 --output gfcg.png
"""

import argparse

import torch
from diffusers import DiTPipeline
from diffusers.utils import make_image_grid

import genkit
from genkit.guidance.gfcg import GFCG
from genkit.networks.image_classifiers import ImageClassifier
from genkit.networks.latent_decoder import LatentDecoder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="facebook/DiT-XL-2-256")
    parser.add_argument(
        "--classifier", default="google/vit-base-patch16-224", help="with the model's numbering of classes"
    )
    parser.add_argument("--labels", type=int, nargs="+", default=[207, 360], help="golden retriever, otter")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="gfcg.png")
    args = parser.parse_args(arguments)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiTPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    classifier = ImageClassifier.from_pretrained(args.classifier).to(device)

    # The classifier looks at the decoded prediction from the first fifth of the noise axis on; before, and wherever it
    # is sure of the class already, plain classifier-free guidance.
    guider = GFCG(strength=args.strength, mode="cfg_switch", guidance_scale=1.5, tau=0.8, classify_start=0.2)
    guider = guider.using(classifier=classifier, decode=LatentDecoder(pipe.vae))
    with genkit.guided(pipe, guider) as run:
        images = pipe(
            class_labels=args.labels,
            num_inference_steps=args.steps,
            generator=torch.Generator(device).manual_seed(args.seed),
        ).images

    stats = run.stats()
    for i, label in enumerate(args.labels):
        confused = sorted({int(k) for k in stats["reference"][:, i] if k >= 0})
        print(f"{label}: probability {stats['p_desired'][-1, i]:.2f} at the end; guided away from {confused}")
    make_image_grid(images, rows=1, cols=len(images)).save(args.output)


if __name__ == "__main__":
    main()
