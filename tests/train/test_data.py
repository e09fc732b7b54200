"""fusedres.train.data and .sources: data sets by name, splits, crops and views of image files."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from PIL import Image
from torchvision.transforms import functional as T

from fusedres.train.data import open_data
from fusedres.train.digits import load_digits
from fusedres.train.recipe import PadCrop, ScaleCrop
from fusedres.train.sources import DataError, Files, View
from tests.train.cifar_files import write_cifar10_pickled
from tests.train.image_folder import CLASSES, write_image_folder

CROP = ScaleCrop(sides=(36, 60), size=32, test_side=36, test_sides=(32, 48))


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "set")


def test_digits():
    data, digits = open_data("digits", PadCrop(1, flip=False)), load_digits()
    assert (len(data.classes), data.channels, data.background) == (10, 1, digits.background)
    assert torch.equal(data.train.images, digits.train_images)
    assert torch.equal(data.test.labels, digits.test_labels)
    assert open_data("digits", PadCrop(), px=12).train.images.shape[1:] == (1, 12, 12)


@pytest.mark.filterwarnings("ignore:.* holds .* images, the published file")
def test_a_validation_split_takes_images_from_training_alone(tmp_path):
    write_cifar10_pickled(tmp_path)
    whole, data = (open_data("cifar10", PadCrop(), root=tmp_path, validation=n, download=False) for n in (0, 30))
    assert (len(data.train.labels), len(data.validation.labels), len(data.test.labels)) == (70, 30, 20)
    rows = torch.cat([data.train.images, data.validation.images]).flatten(1)
    assert torch.equal(rows.unique(dim=0), whole.train.images.flatten(1).unique(dim=0))
    assert whole.validation is None
    again = open_data("cifar10", PadCrop(), root=tmp_path, validation=30, download=False)
    assert torch.equal(again.validation.images, data.validation.images)


def test_an_image_folder_lists_its_classes_and_files(folder):
    data = open_data(f"imagefolder:{folder}", CROP, validation=3)
    assert data.classes == CLASSES
    assert (len(data.train.labels), len(data.validation.labels), len(data.test.labels)) == (9, 3, 12)
    for source in (data.train, data.validation, data.test):
        assert [CLASSES[label] for label in source.labels] == [path.parent.name for path in source.files]
    assert not set(data.train.files) & set(data.validation.files)


def test_a_training_crop_is_the_one_that_its_draws_say(folder):
    source = open_data(f"imagefolder:{folder}", CROP).train
    image = Image.open(source.files[1])  # 45 × 55
    # Side 36 + ⌊0.5·25⌋ = 48: the image becomes 48 × 58, and the crop starts at ⌊0.9·27⌋, ⌊0.3·17⌋.
    crop = source.fetch(torch.tensor([1]), torch.tensor([[0.5, 0.9, 0.3, 0, 0, 0, 0]]))
    expected = T.pil_to_tensor(T.resize(image, 48))[:, 24:56, 5:37]
    assert torch.equal(crop[0], expected)


def test_all_scales_and_places_of_a_crop_are_reached(folder, monkeypatch):
    seen = []
    source = open_data(f"imagefolder:{folder}", CROP).train
    resize, crop = T.resize, T.crop
    monkeypatch.setattr(T, "resize", lambda image, side: seen.append([side]) or resize(image, side))
    monkeypatch.setattr(T, "crop", lambda image, *place: seen[-1].extend([*image.size, *place]) or crop(image, *place))
    draws = torch.rand(600, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    source.fetch(torch.zeros(600, dtype=torch.long), draws)
    assert {side for side, *_ in seen} == set(range(36, 61))
    for _, width, height, top, left, h, w in seen:
        assert 0 <= top <= height - 32
        assert 0 <= left <= width - 32
        assert h == w == 32
    assert min(top for _, _, _, top, *_ in seen) == 0
    assert any(left == width - 32 for _, width, _, _, left, *_ in seen)


def test_views_of_an_image(folder):
    source = open_data(f"imagefolder:{folder}", CROP).test
    image = T.resize(Image.open(source.files[2]), 36)
    single = source.fetch(torch.tensor([2]), None)[0]
    assert torch.equal(single, T.pil_to_tensor(T.center_crop(image, 32)))

    ten = source.with_view(View("ten", 36, 32)).fetch(torch.tensor([2]), None)[0]
    whole = T.pil_to_tensor(T.center_crop(image, 36))
    assert ten.shape == (10, 3, 32, 32)
    assert torch.equal(ten[4], single)
    for i, (rows, columns) in enumerate(
        ((slice(0, 32), slice(0, 32)), (slice(0, 32), slice(-32, None)), (slice(-32, None), slice(0, 32)))
    ):
        assert torch.equal(ten[i], whole[:, rows, columns])
    # torchvision mirrors the image, then cuts: the mirrored centre is the centre mirrored.
    assert torch.equal(ten[9], single.flip(-1))

    both = source.with_view(View("whole", 48, 48)).fetch(torch.tensor([2]), None)[0]
    assert min(both.shape[-2:]) == 48
    assert torch.equal(both[1], both[0].flip(-1))


def test_px_scales_everything_in_proportion(folder):
    crop = open_data(f"imagefolder:{folder}", ScaleCrop(), px=64).train.crop
    assert (crop.size, crop.sides, crop.test_side) == (64, (73, 137), 73)
    assert crop.test_sides == (64, 73, 110, 137, 183)


def test_grey_and_palette_files_become_rgb(folder):
    path = folder / "val" / "ant" / "0.png"
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(path)
    assert torch.equal(
        open_data(f"imagefolder:{folder}", CROP).test.fetch(torch.tensor([0]), None),
        torch.full((1, 3, 32, 32), 7, dtype=torch.uint8),
    )


def test_a_truncated_image_is_named(folder):
    path = folder / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    source = open_data(f"imagefolder:{folder}", CROP).test
    with pytest.raises(DataError, match=r"the image .*bee/1.png can not be read"):
        source.fetch(torch.tensor([source.files.index(path)]), None)


@pytest.mark.parametrize(
    ("name", "crop", "options", "message"),
    [
        (
            "mnist",
            PadCrop(),
            {},
            "data: expected one of cifar10, cifar100, digits, mnist5k, imagefolder:PATH, got 'mnist'",
        ),
        ("digits", CROP, {}, "recipe: expected one for images of one size"),
        ("imagefolder:/nowhere", PadCrop(), {}, "recipe: expected one that scales its images"),
        ("imagefolder:/nowhere", CROP, {}, "there is no folder /nowhere/train; expected /nowhere/train/CLASS/"),
        ("digits", PadCrop(), {"px": 4}, "px must be at least 8"),
        ("cifar10", PadCrop(), {"px": 64}, "px: the images of cifar10 are 32 pixels wide, got 64"),
        ("mnist5k", PadCrop(), {"px": 32}, "px: the images of mnist5k are 28 pixels wide, got 32"),
        ("digits", PadCrop(), {"validation": 1437}, "validation must be between 1 and 1436"),
    ],
)
def test_what_does_not_go_together_is_refused(name, crop, options, message):
    with pytest.raises(ValueError, match=message):
        open_data(name, crop, download=False, **options)


def test_a_folder_that_is_not_as_expected_is_described(folder):
    (folder / "val" / "cow").rename(folder / "val" / "dog")
    with pytest.raises(DataError, match="differ in the classes cow, dog"):
        open_data(f"imagefolder:{folder}", CROP)
    (folder / "val" / "dog").rename(folder / "val" / "cow")
    for path in (folder / "val" / "cow").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="val/cow holds no images"):
        open_data(f"imagefolder:{folder}", CROP)


def test_a_million_paths_are_one_piece_of_memory():
    paths = [Path(f"/set/ä{i}/{'x' * (i % 5)}.png") for i in range(50)]
    files = Files(paths)
    assert list(files) == paths
    assert files[-1] == paths[-1]
    assert files[3:7] == paths[3:7]
    assert files.index(paths[11]) == 11
    with pytest.raises(IndexError):
        files[50]
