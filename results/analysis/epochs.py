# SPDX-License-Identifier: MIT
"""What the training attack and a stronger one reach at each epoch, and which epoch each chooses.

    OMP_NUM_THREADS=1 python results/analysis/epochs.py DATA_DIR EPOCH.pt [EPOCH.pt ...]

EPOCH.pt is a copy of a run's last.pt, taken after an epoch. On the 1,000 held-out images of MNIST
it prints the mean cross-entropy after the run's own training attack, and after PGD-50 whose steps
fall from 2 eps (lab/steps.py); then accuracies: clean, under PGD-10, which chooses Best, and under
that PGD-50.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import train                                                                    # noqa: E402
from lab.steps import falling_steps                                             # noqa: E402
from s4_adv import pgd                                                          # noqa: E402


def main(data_dir, files):
    x, y, *_ = train.torchvision_data("mnist", data_dir)
    x, y = x[-train.HELD_OUT:] / 255, y[-train.HELD_OUT:]
    print("epoch  loss: training attack  PGD-50 from 2 eps",
          "  accuracy: clean  PGD-10  PGD-50 from 2 eps", sep="")
    for file in files:
        state = torch.load(file, weights_only=True)
        c, model = state["config"], train.load(file)
        eps = c["eps"]
        torch.manual_seed(0)
        own = pgd(model, x, y, eps, c["alphas"] or c["alpha"], c["steps"])
        ten = pgd(model, x, y, eps, c["alpha"], 10)
        long = pgd(model, x, y, eps, falling_steps(2 * eps, 50), 50)
        with torch.no_grad():
            z = {name: model(images) for name, images in
                 {"clean": x, "own": own, "ten": ten, "long": long}.items()}
        loss = {name: F.cross_entropy(logits, y).item() for name, logits in z.items()}
        right = {name: 100 * (logits.argmax(1) == y).double().mean() for name, logits in z.items()}
        print(f"{state['epoch']:5d}{loss['own']:23.3f}{loss['long']:19.3f}{right['clean']:17.1f}"
              f"{right['ten']:8.1f}{right['long']:19.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
