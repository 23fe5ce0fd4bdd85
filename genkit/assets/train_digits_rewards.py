"""Train the classifiers of the reward ``digits``: ``python genkit/assets/train_digits_rewards.py`` (half a minute).

Each sees one half of scikit-learn's digits and is tested on the other; the one that is trained on is convolutional, the
one that is held out is not, so that what fools the first need not fool the second. Writes weights and a record for each
beside this file. The classifier of evaluation (eval/assets) is a third one.
"""

import json
from pathlib import Path
from typing import Any

import sklearn
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from genkit.rewards.digits import network

HERE = Path(__file__).parent
SPLIT_SEED = 1
STEPS = 2500
BATCH = 128
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.01
NOISE = 0.3  # deviation of noise on pixels in [-1, 1], so that gradients follow strokes rather than single pixels
# Seed, half of the digits, and the network's settings.
NETWORKS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "trained": (1, 0, dict(channels=12, hidden=48, num_classes=10, dropout=0.3)),
    "held_out": (2, 1, dict(hidden=96, dropout=0.3)),
}


def train(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier called ``name``, in evaluation mode, and a record of how it was trained."""
    seed, half, config = NETWORKS[name]
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    halves = train_test_split(range(len(labels)), test_size=0.5, stratify=digits.target, random_state=SPLIT_SEED)
    seen, unseen = halves[half], halves[1 - half]
    torch.manual_seed(seed)
    model = network(name, **config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.1)
    padded, y = F.pad(images[seen], (1, 1, 1, 1), value=-1.0), labels[seen]
    for _ in range(STEPS):
        pick, (top, left) = torch.randint(0, len(y), (BATCH,)), torch.randint(0, 3, (2,)).tolist()
        shown = padded[pick, :, top : top + 8, left : left + 8]
        loss = F.cross_entropy(model(shown + NOISE * torch.randn_like(shown)), y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double()
    record = {
        "data": f"sklearn.datasets.load_digits ({len(labels)} images), pixels / 8 - 1",
        "split": f"stratified halves by train_test_split, random_state={SPLIT_SEED}; this one saw number {half}",
        "seed": seed,
        "train_accuracy": right[seen].mean().item(),
        "test_accuracy": right[unseen].mean().item(),
        "steps": STEPS,
        "batch_size": BATCH,
        "augmentation": f"shifts of up to one pixel, normal noise of deviation {NOISE}",
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
    }
    return model, {"config": config, "training": record}


if __name__ == "__main__":
    for name in NETWORKS:
        model, record = train(name)
        save_file(model.state_dict(), HERE / f"digits_{name}.safetensors")
        text = json.dumps(record, indent=2)
        (HERE / f"digits_{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name, text)
