"""`fusedres train --evaluate`: the papers' tests and ensembles, against the same computed by hand."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from torchvision import transforms

from fusedres.models import create
from fusedres.train import checkpoint
from fusedres.train.digits import load_digits
from fusedres_cli.main import main
from tests.train.image_folder import CLASSES, write_image_folder

pytestmark = pytest.mark.usefixtures("plain_where_small")
LINE = re.compile(r"^(.*)test \((.*)\): loss (\S+), error (\S+)%, accuracy \S+%, top-5 error (\S+)%$", re.MULTILINE)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def train(*arguments):
    return main(["train", "--device", "cpu", "--threads", "1", *map(str, arguments)])


def lines(output):
    """Of each report: what is before it, the kind of the test, loss, error and top-5 error in per cent."""
    return [(before, kind, *map(float, numbers)) for before, kind, *numbers in LINE.findall(output)]


def reported(*arguments, capsys):
    capsys.readouterr()
    assert train("--evaluate", *arguments) == 0
    return lines(capsys.readouterr().out)


def figures(chances, labels):
    """Loss, error and top-5 error in per cent, of probabilities (N, classes), to the digits that are printed."""
    ranks = chances.argsort(1, descending=True)
    place = (ranks == labels[:, None]).long().argmax(1)
    loss = -chances.gather(1, labels[:, None]).log().mean().item()
    errors = (100 * (place >= first).double().mean().item() for first in (1, 5))
    return (pytest.approx(loss, abs=1e-4), *(pytest.approx(error, abs=0.0051) for error in errors))


# Of the papers' 256 and {224, 256, 384, 480, 640} for crops of 224, what is in proportion for crops of 32.
SIDE, SIDES = 37, (32, 37, 55, 69, 91)


def opened(path):
    return Image.open(path).convert("RGB")


def single(image):
    return [transforms.CenterCrop(32)(transforms.Resize(SIDE)(image))]


def ten(image):
    """Krizhevsky 2012: the shorter side to 256, the central square of 256, its corners and centre, mirrored too."""
    return transforms.TenCrop(32)(transforms.CenterCrop(SIDE)(transforms.Resize(SIDE)(image)))


def whole(image):
    """He 2015: the whole image, its shorter side of each length, mirrored too."""
    images = [transforms.Resize(side)(image) for side in SIDES]
    return [*images, *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images)]


def pixels(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).movedim(2, 0)


def test_he2015_imagenet_is_tested_as_in_the_papers(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "set")
    given = ["--data", f"imagefolder:{folder}", "--recipe", "he2015-imagenet", "--px", 32, "--batch", 4]
    given += ["--workers", 0]
    assert train(*given, "--iterations", 6, "--lr", 0.01, "--out", tmp_path / "out") == 0

    model = create("cifar_resnet20", num_classes=3, fused=False)
    model.load_state_dict(torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    model.eval()
    seen = torch.stack([pixels(single(opened(path))[0]) for path in sorted(folder.glob("train/*/*.png"))])
    per_pixel, deviation = seen.mean(0), seen.std((0, 2, 3), correction=0)[:, None, None]

    def chance(view):
        x = pixels(view)
        mean = per_pixel if x.shape == per_pixel.shape else per_pixel.mean((1, 2))[:, None, None]
        with torch.no_grad():
            return model(((x - mean) / deviation)[None]).softmax(1)[0]

    paths = [path for name in CLASSES for path in sorted(folder.glob(f"val/{name}/*.png"))]
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    losses = set()
    for kind, views in (("single", single), ("ten-crop", ten), ("multi-scale", whole)):
        ((before, told, *numbers),) = reported(
            *given, "--weights", tmp_path / "out" / "checkpoint.pt", "--test", kind, capsys=capsys
        )
        chances = torch.stack([torch.stack([chance(view) for view in views(opened(path))]).mean(0) for path in paths])
        assert (before, told) == ("", kind)
        assert tuple(numbers) == figures(chances, labels)
        losses.add(numbers[0])
    assert len(losses) == 3, "the tests could not be told apart"


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Checkpoints of two networks, trained on digits with means per channel and per pixel."""
    folder = tmp_path_factory.mktemp("members")
    threads = torch.get_num_threads()
    short = ["--data", "digits", "--batch", "64"]
    assert train(*short, "--iterations", 12, "--seed", 1, "--out", folder / "a") == 0
    more = ["--recipe", "he2015-cifar", "--model", "cifar_plain20", "--iterations", 8]
    assert train(*short, *more, "--out", folder / "b") == 0
    torch.set_num_threads(threads)
    return folder


def chances(folder, name, *, per_pixel):
    """The probabilities that a member gives the digits to be tested."""
    model = create(name, in_channels=1, fused=False)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    digits = load_digits()
    train_images = digits.train_images
    mean = train_images.mean(0) if per_pixel else train_images.mean()
    with torch.no_grad():
        return model.eval()((digits.test_images - mean) / train_images.std(correction=0)).softmax(1)


def test_an_ensemble_is_the_mean_of_the_probabilities_of_its_members(members, capsys):
    a, b = members / "a", members / "b"
    by_hand = [chances(a, "cifar_resnet20", per_pixel=False), chances(b, "cifar_plain20", per_pixel=True)]
    labels = load_digits().test_labels
    one, other, both = reported("--weights", a / "checkpoint.pt", b / "checkpoint.pt", capsys=capsys)
    assert [one[0], other[0], both[0]] == [
        f"{a / 'checkpoint.pt'}, cifar_resnet20: ", f"{b / 'checkpoint.pt'}, cifar_plain20: ", "ensemble of 2: ",
    ]  # fmt: skip
    for line, expected in zip((one, other, both), (*by_hand, (by_hand[0] + by_hand[1]) / 2), strict=True):
        assert line[2:] == figures(expected, labels)
    assert len({one[2], other[2], both[2]}) == 3


def test_an_ensemble_of_one_is_that_one(members, capsys):
    path = members / "b" / "best.pt"
    (alone,) = reported("--weights", path, capsys=capsys)
    assert alone[0] == ""
    again = reported("--weights", path, path, capsys=capsys)
    assert [line[2:] for line in again] == [alone[2:]] * 3


def test_a_state_dict_is_of_the_network_that_is_asked_for(members, capsys):
    given = ["--weights", members / "a" / "checkpoint.pt", members / "b" / "model.pt", "--recipe", "he2015-cifar"]
    _, other, _ = reported(*given, "--model", "cifar_plain20", capsys=capsys)
    assert other[2:] == reported("--weights", members / "b" / "checkpoint.pt", capsys=capsys)[0][2:]
    assert train("--evaluate", *given, "--model", "cifar_resnet32") == 2
    assert f"{members / 'b' / 'model.pt'}: weights of another network" in capsys.readouterr().err


def changed(members, target, **config):
    """A checkpoint whose configuration says something else."""
    state = torch.load(members / "a" / "checkpoint.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | config}, target)
    return target


class Ran(Exception):
    """The code in a pickle was run."""


class Trap:
    def __reduce__(self):
        return (exec, ("raise __import__('tests.train.test_run_evaluation', fromlist=['Ran']).Ran",))


def test_members_that_can_not_be_tested_are_named_before_any_test(members, tmp_path, capsys):
    good = members / "a" / "checkpoint.pt"
    torch.save(create("cifar_resnet20", num_classes=100, in_channels=1).state_dict(), tmp_path / "hundred.pt")
    torch.save({"model": {"weight": torch.zeros(1)}, "config": Trap()}, tmp_path / "trap.pt")
    file = tmp_path / "net.py"
    file.write_text("raise AssertionError('it was run')")
    for path, message in (
        (tmp_path / "none.pt", f"weights: there is no file {tmp_path / 'none.pt'}"),
        (tmp_path / "hundred.pt", f"{tmp_path / 'hundred.pt'}: classes: expected weights for 10, got some for 100"),
        (tmp_path / "trap.pt", f"{tmp_path / 'trap.pt'} is truncated or not written by torch.save"),
        (
            changed(members, tmp_path / "odd.pt", model=3),
            "odd.pt: config: expected model, option and recipe.mean, got 3",
        ),
        (changed(members, tmp_path / "file.pt", model=f"{file}:Net"), f"expected --model {file}:Net together with it"),
        (changed(members, tmp_path / "other.pt", model="cifar_resnet32"), "other.pt: weights of another network"),
    ):
        assert train("--evaluate", "--weights", good, path) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.out == ""


def test_a_training_starts_from_one_file(members, tmp_path, capsys):
    path = members / "a" / "checkpoint.pt"
    assert train("--weights", path, path, "--out", tmp_path / "out") == 2
    assert "weights: expected one file to start from, or --evaluate, got 2 files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert train("--weights", path, "--batch", 64, "--iterations", 1, "--lr", 1e-30, "--out", tmp_path / "out") == 0
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert torch.equal(state["conv1.weight"], checkpoint.read_weights(path).state["conv1.weight"]), "a step of nearly 0"
