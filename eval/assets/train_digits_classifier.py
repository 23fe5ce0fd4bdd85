"""Train the shipped digits classifier: ``python eval/assets/train_digits_classifier.py`` (under a minute on one core).

Writes digits_classifier.safetensors (weights) and digits_classifier.json (config, and how it was trained) beside this
file, and prints the test accuracy. Weights that differ change every Frechet distance: the extractor's id carries their
hash, so results from different weights are refused as incomparable.
"""

import json
from pathlib import Path

import sklearn
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from genkit.networks.digits_classifier import DigitsClassifier

HERE = Path(__file__).parent
SEED = 0
TEST_SIZE = 360
STEPS = 2500
BATCH = 128
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.01


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, background filled in."""
    n = len(images)
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    dy, dx = torch.randint(0, 3, (2, n, 1, 1), generator=generator)
    rows, columns = torch.arange(8).view(1, 8, 1) + dy, torch.arange(8).view(1, 1, 8) + dx
    return padded[torch.arange(n).view(n, 1, 1), 0, rows, columns].unsqueeze(1)


def train(seed: int = SEED) -> tuple[DigitsClassifier, dict]:
    """The trained classifier, in evaluation mode, and a record of how it was trained."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train_index, test_index = train_test_split(
        range(len(labels)), test_size=TEST_SIZE, stratify=digits.target, random_state=seed
    )
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitsClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.1)
    x, y = images[train_index], labels[train_index]
    for _ in range(STEPS):
        pick = torch.randint(0, len(x), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(shifted(x[pick], generator)), y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = {
            name: (model(images[index]).argmax(1) == labels[index]).double().mean().item()
            for name, index in (("train", train_index), ("test", test_index))
        }
    record = {
        "data": f"sklearn.datasets.load_digits ({len(labels)} images), pixels / 8 - 1",
        "split": f"stratified train_test_split, {len(train_index)} train / {TEST_SIZE} test, random_state={seed}",
        "seed": seed,
        "train_accuracy": right["train"],
        "test_accuracy": right["test"],
        "steps": STEPS,
        "batch_size": BATCH,
        "augmentation": "shifts of up to one pixel",
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
    }
    return model, record


if __name__ == "__main__":
    model, record = train()
    save_file(model.state_dict(), HERE / "digits_classifier.safetensors")
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    text = json.dumps({"config": config, "training": record}, indent=2)
    (HERE / "digits_classifier.json").write_text(text + "\n", encoding="utf-8")
    print(text)
