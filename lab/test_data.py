# SPDX-License-Identifier: MIT
"""Images on the disk: what is there and whole is taken, what is not is named."""
import gzip
import shutil
import sys
import tarfile

import pytest
import torch

import s4_adv
import train
from lab.tiny_imagenet import load as load_tiny_imagenet
from test_all import DATA, needs, settings

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
datasets = pytest.importorskip("torchvision.datasets")
CLASSES = ("n01", "n02")


# ---- Tiny-ImageNet -------------------------------------------------------------------------------

def jpeg(file, size=64, grey=0):
    """Writes an image of one grey."""
    from torchvision.io import encode_jpeg
    image = torch.full((3, size, size), grey, dtype=torch.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode_jpeg(image).numpy().tobytes())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Tiny-ImageNet as it is unpacked, of two classes: each image of val is as grey as its place
    among all."""
    folder = tmp_path_factory.mktemp("data") / "tiny-imagenet-200"
    for k, w in enumerate(CLASSES):
        first = folder / "train" / w / "images" / f"{w}_0.JPEG"
        jpeg(first)
        for i in range(1, 500):
            shutil.copy(first, first.with_name(f"{w}_{i}.JPEG"))
    rows = []
    for i in range(100):
        jpeg(folder / "val" / "images" / f"val_{i}.JPEG", grey=2 * i)
        rows.append(f"val_{i}.JPEG\t{CLASSES[i % 2]}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("n01\nn02\nn03\n")
    return folder


@pytest.fixture
def tiny_imagenet(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "tiny-imagenet-200")


@pytest.mark.parametrize("inside", ["", "images"])
@pytest.mark.parametrize("annotations_stay", [True, False])
def test_val_that_was_sorted_into_folders_of_classes_has_the_same_images_in_the_same_order(
        inside, annotations_stay, whole, tiny_imagenet):
    val = tiny_imagenet / "val"
    for i in range(100):
        place = val / CLASSES[i % 2] / inside
        place.mkdir(parents=True, exist_ok=True)
        (val / "images" / f"val_{i}.JPEG").rename(place / f"val_{i}.JPEG")
    (val / "images").rmdir()
    if not annotations_stay:
        (val / "val_annotations.txt").unlink()
    expected, found = (load_tiny_imagenet(folder, 2) for folder in (whole, tiny_imagenet))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert found[3].tolist() == 50 * [0, 1]


def remove(folder):
    (folder / "train" / "n02" / "images" / "n02_7.JPEG").unlink()


def add(folder):
    jpeg(folder / "train" / "n01" / "images" / "extra.JPEG")


def empty(folder):
    for file in (folder / "train" / "n01" / "images").iterdir():
        file.unlink()


def forget(folder):
    file = folder / "val" / "val_annotations.txt"
    file.write_text("".join(file.read_text().splitlines(True)[2:]))


def shrink(folder):
    jpeg(folder / "train" / "n01" / "images" / "n01_3.JPEG", size=32)


def enlarge(folder):
    for i in range(100):
        jpeg(folder / "val" / "images" / f"val_{i}.JPEG", size=224)


def break_off(folder):
    file = folder / "val" / "images" / "val_5.JPEG"
    file.write_bytes(file.read_bytes()[:100])


def take_away(folder):
    (folder / "val" / "images" / "val_6.JPEG").unlink()


def list_without_tabs(folder):
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG n01\n")


def list_of_bytes(folder):
    (folder / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\tn01\n")


def names_of_bytes(folder):
    (folder / "wnids.txt").write_bytes(b"n01\xff\n")


def names_twice(folder):
    (folder / "wnids.txt").write_text("n01\nn01\n")


def names_as_folder(folder):
    (folder / "wnids.txt").unlink()
    (folder / "wnids.txt").mkdir()


WRONG = {
    remove: "train has 499 images of the class n02, and the official archive 500",
    add: "train has 501 images of the class n01",
    empty: "train has 0 images of the class n01",
    forget: "val has 49 images of the class n01, and the official archive 50",
    shrink: "n01_3.JPEG is missing, damaged or of another size (it has 32 x 32 pixels",
    enlarge: "val_0.JPEG is missing, damaged or of another size (it has 224 x 224 pixels",
    break_off: "val_5.JPEG is missing, damaged or of another size",
    take_away: "val_6.JPEG is missing, damaged or of another size",
    list_without_tabs: "no Tiny-ImageNet there (not enough values",
    list_of_bytes: "no Tiny-ImageNet there ('utf-8' codec",
    names_of_bytes: "no Tiny-ImageNet there ('utf-8' codec",
    names_twice: "has the images of 1 classes; give at most 1",
    names_as_folder: "no Tiny-ImageNet there ([Errno 21] Is a directory",
}


@pytest.mark.parametrize("damage", WRONG)
def test_tiny_imagenet_is_counted_and_measured_and_what_is_wrong_is_named(
        damage, tiny_imagenet, capsys):
    damage(tiny_imagenet)
    words = ["--dataset", "tiny-imagenet", "--classes", "2", "--device", "cpu"]
    assert train.main([*words, "--data-dir", str(tiny_imagenet.parent)]) == 2
    err = capsys.readouterr().err
    assert WRONG[damage] in err and err.startswith("train.py: ") and err.count("\n") == 1


@pytest.mark.parametrize("lacks", ["torchvision", "its image extension"])
def test_without_a_decoder_tiny_imagenet_is_not_called_damaged(lacks, whole, monkeypatch):
    if lacks == "torchvision":
        monkeypatch.setitem(sys.modules, "torchvision.io", None)
    else:
        class Empty:
            pass
        monkeypatch.setattr(torch.ops, "image", Empty(), raising=False)
    with pytest.raises(train.UserError, match="^--dataset tiny-imagenet needs torchvision, which"):
        load_tiny_imagenet(whole, 2)


# ---- MNIST and CIFAR-10 --------------------------------------------------------------------------

def test_a_data_folder_below_home_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings("--data-dir", "~/x").data_dir == str(tmp_path / "x")
    assert settings("--out=~/x").out == str(tmp_path / "x")
    seen = []
    monkeypatch.setattr(datasets, "MNIST", lambda root, **options: seen.append(root) or 1 / 0)
    monkeypatch.setattr(sys, "argv", ["s4_adv.py", "--data-dir=~/x"])
    with pytest.raises(SystemExit):
        s4_adv.main()
    assert seen == [str(tmp_path / "x")]


def test_an_empty_folder_that_a_failed_download_left_is_not_called_damaged(monkeypatch, tmp_path):
    def no_network(dataset):
        (tmp_path / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        raise RuntimeError("no network")
    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    for _ in range(2):
        with pytest.raises(train.UserError, match="MNIST is not there, .* downloaded .no network"):
            train.torchvision_data.__wrapped__("mnist", str(tmp_path))


@needs("MNIST")
def test_archives_of_mnist_are_unpacked_where_they_lie(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (DATA / "MNIST" / "raw").glob("*-ubyte"):
        with gzip.open(raw / f"{file.name}.gz", "wb", compresslevel=1) as archive:
            archive.write(file.read_bytes())
    # torchvision compares checksums of the archives that it publishes; these are our own.
    own = [(name, None) for name, _ in datasets.MNIST.resources]
    monkeypatch.setattr(datasets.MNIST, "resources", own)
    found = train.torchvision_data.__wrapped__("mnist", str(tmp_path))
    expected = train.torchvision_data("mnist", str(DATA))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs("cifar-10-batches-py")
def test_the_archive_of_cifar10_mends_what_was_half_unpacked(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", compresslevel=0) as archive:
        archive.add(DATA / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", None)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"half")
    found = train.torchvision_data.__wrapped__("cifar10", str(tmp_path))
    expected = train.torchvision_data("cifar10", str(DATA))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
