# SPDX-License-Identifier: MIT
"""Is a model wrong between an image and the end of its own training attack?

    OMP_NUM_THREADS=1 python results/analysis/segment.py DATA_DIR BEST.pt [BEST.pt ...]

Kim, Lee & Lee 2021 (arXiv 2010.01799) find such images after training on FGSM. BEST.pt is a model
of MNIST. On the first 200 test images it prints the accuracy at x + k delta, k = 0, .2 to 1, where
x + delta is the end of the run's training attack; then the number of images that are right at k = 1
and wrong at one of k = .1, .2, ... .9.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train                                                                    # noqa: E402
from s4_adv import pgd                                                          # noqa: E402


def main(data_dir, files):
    *_, x, y = train.torchvision_data("mnist", data_dir)
    x, y = x[:200] / 255, y[:200]
    for file in files:
        c, model = torch.load(file, weights_only=True)["config"], train.load(file)
        torch.manual_seed(0)
        delta = pgd(model, x, y, c["eps"], c.get("alphas") or c["alpha"], c["steps"]) - x
        with torch.no_grad():
            right = torch.stack([model(x + k / 10 * delta).argmax(1) == y for k in range(11)])
        between = (right[-1] & ~right.all(0)).sum()
        print(file)
        print("  accuracy:", *(f"{100 * share:.1f}" for share in right[::2].double().mean(1)))
        print(f"  right at the end, wrong before: {between} of {len(x)} images")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
