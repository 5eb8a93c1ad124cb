# SPDX-License-Identifier: MIT
"""Tiny-ImageNet-200, as its official archive is unpacked: counted, measured, decoded."""
import torch

from train import UserError, lack_of_torchvision


def load(root, n_classes):
    """Images and labels, training then test, of the first n_classes of wnids.txt.

    val is as it was unpacked, or sorted into a folder for each class, with or without images/.
    Training images come in one fixed shuffled order, since the official one goes class by class.
    UserError where an image is missing, or one too many.
    """
    try:
        wnids = dict.fromkeys((root / "wnids.txt").read_text().split())
        wnids = [w for w in wnids if (root / "train" / w).is_dir()]
        if n_classes > len(wnids):
            raise UserError(f"--classes {n_classes}: {root} has the images of {len(wnids)} "
                            f"classes; give at most {len(wnids)}")
        label = {w: i for i, w in enumerate(wnids[:n_classes])}
        for_training = in_class_folders(root / "train", label)
        for_test = in_class_folders(root / "val", label)
        if not for_test:
            rows = (root / "val" / "val_annotations.txt").read_text().splitlines()
            for row in rows:
                name, w = row.split("\t")[:2]
                if w in label:
                    for_test.append((root / "val" / "images" / name, label[w]))
    except (OSError, ValueError) as e:
        raise UserError(f"--data-dir {root.parent}: no Tiny-ImageNet there ({e}); unpack the "
                        f"official tiny-imagenet-200.zip so that {root / 'wnids.txt'} exists, "
                        "or use --dataset synthetic") from e
    for folder, files, n in (("train", for_training, 500), ("val", for_test, 50)):
        labels = [i for _, i in files]
        for w, i in label.items():
            if labels.count(i) != n:
                raise UserError(f"--data-dir {root.parent}: {root / folder} has "
                                f"{labels.count(i)} images of the class {w}, and the official "
                                f"archive {n}; unpack it again")
    for_test.sort(key=order_of_val)
    order = torch.randperm(len(for_training), generator=torch.Generator().manual_seed(0))
    return *decode([for_training[i] for i in order]), *decode(for_test)


def in_class_folders(folder, label):
    """[(JPEG file, label)] of the classes that have a folder, or images/ in one."""
    found = []
    for w, i in label.items():
        place = folder / w / "images"
        if not place.is_dir():
            place = folder / w
        found += [(file, i) for file in sorted(place.glob("*.JPEG"))]
    return found


def order_of_val(item):
    """The order of val_annotations.txt: val_2.JPEG before val_10.JPEG."""
    file, _ = item
    return len(file.name), file.name


def decode(files):
    """[(JPEG file, label)] -> images uint8 (n, 3, 64, 64), labels (n,)."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file
        torch.ops.image.decode_jpeg                                         # its image extension
    except Exception as e:
        raise lack_of_torchvision("tiny-imagenet", e) from e
    images = []
    for file, _ in files:
        try:
            image = decode_jpeg(read_file(str(file)), mode=ImageReadMode.RGB)
            if image.shape != (3, 64, 64):
                raise RuntimeError("it has {1} x {2} pixels, not 64 x 64".format(*image.shape))
        except RuntimeError as e:
            raise UserError(f"--data-dir: the image {file} is missing, damaged or of another size "
                            f"({str(e).partition(chr(10))[0]}); unpack the official archive "
                            "again") from e
        images.append(image)
    return torch.stack(images), torch.tensor([i for _, i in files])
