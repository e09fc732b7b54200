"""fusedres.train.evaluation: each kind of test against its definition."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("torchvision")

from torchvision.transforms import functional as T

from fusedres.train.augment import Augment, measure
from fusedres.train.data import open_data
from fusedres.train.distributed import World
from fusedres.train.evaluation import Evaluator, views
from fusedres.train.recipe import PadCrop, ScaleCrop
from fusedres.train.sources import Arrays, DataError, read_image
from tests.train.image_folder import write_image_folder

HERE = World(0, 1, torch.device("cpu"))
CROP = ScaleCrop(sides=(36, 60), size=32, test_side=36, test_sides=(32, 48))


class Net(nn.Module):
    """A convolution, global pooling, a classifier; its dropout would show if it were left in training mode."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.dropout(self.conv(x).relu().mean((2, 3)), training=self.training))


@pytest.fixture
def folder(tmp_path):
    data = open_data(f"imagefolder:{write_image_folder(tmp_path / 'set')}", CROP)
    return data.test, Augment(measure(data.train, "pixel"), CROP)


def expected(model, source, augment, crops):
    """Loss and error from crops of every image, one by one."""
    model.eval()
    losses, wrong = [], 0
    for path, label in zip(source.files, source.labels, strict=True):
        with torch.no_grad():
            chances = [model(augment(T.pil_to_tensor(crop)[None], None)).softmax(1)[0] for crop in crops(path)]
        mean = torch.stack(chances).mean(0)
        losses.append(-mean[label].log().item())
        wrong += int(mean.argmax() != label)
    model.train()
    return sum(losses) / len(losses), wrong / len(losses)


def single(path):
    return [T.center_crop(T.resize(read_image(path), 36), 32)]


def ten(path):
    image = T.center_crop(T.resize(read_image(path), 36), 36)
    corners = [T.crop(image, top, left, 32, 32) for top in (0, image.height - 32) for left in (0, image.width - 32)]
    five = [*corners, T.center_crop(image, 32)]
    return [*five, *(T.hflip(crop) for crop in five)]


def whole(path):
    images = [T.resize(read_image(path), side) for side in (32, 48)]
    return [*images, *(T.hflip(image) for image in images)]


@pytest.mark.parametrize(("kind", "crops"), [("single", single), ("ten-crop", ten), ("multi-scale", whole)])
@pytest.mark.parametrize("batch", [5, 64])
def test_each_kind_averages_the_probabilities_of_its_views(folder, kind, crops, batch):
    source, augment = folder
    torch.manual_seed(0)
    model = Net(3).train()
    result = Evaluator(source, augment, HERE, batch=batch, kind=kind)(model)
    loss, error = expected(model, source, augment, crops)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.error == pytest.approx(error)
    assert 0 < result.error < 1
    assert result.error5 == 0  # of three classes
    assert model.training


def test_top5_error():
    images = torch.rand(40, 3, 8, 8)
    source = Arrays(images, torch.arange(40) % 10)
    torch.manual_seed(0)
    model = Net(10)
    result = Evaluator(source, Augment(measure(source, "channel"), PadCrop()), HERE, batch=7)(model)
    with torch.no_grad():
        normal = (images - images.mean((0, 2, 3))[:, None, None]) / images.std((0, 2, 3), correction=0)[:, None, None]
        ranks = model.eval()(normal).argsort(1, descending=True)
    place = (ranks == source.labels[:, None]).long().argmax(1)
    assert result.error5 == pytest.approx((place >= 5).float().mean().item())
    assert result.error == pytest.approx((place >= 1).float().mean().item())
    assert 0 < result.error5 < result.error < 1


def test_small_images_have_a_single_view():
    source = Arrays(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    for kind in ("ten-crop", "multi-scale"):
        with pytest.raises(ValueError, match=f"test: {kind} needs an image folder"):
            views(source, kind)
    with pytest.raises(ValueError, match="test: expected one of single, ten-crop, multi-scale, got 'best'"):
        views(source, "best")


def test_a_broken_image_stops_the_test_with_its_name(folder):
    source, augment = folder
    source.files[3].write_bytes(b"nothing")
    with pytest.raises(DataError, match=str(source.files[3])):
        Evaluator(source, augment, HERE, batch=5)(Net(3))
