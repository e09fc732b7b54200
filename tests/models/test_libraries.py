"""fusedres.models.libraries: networks of torchvision and timm by the papers' names, fused and plain."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.models import create, entry, names
from fusedres.models.sources import IMAGES, source
from fusedres.nn.fused import Fused
from tests.comparison import relative_error
from tests.nn.twins import randomised

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

OF_LIBRARIES = {name: entry(name).library_name for name in names() if entry(name).library_name is not None}
DETECTOR = "fasterrcnn_resnet50_fpn"
CLASSIFIERS = [name for name in OF_LIBRARIES if name != DETECTOR]
SMALL = ("mobilenet_v2", "regnet_x_400mf", "regnet_y_400mf")
small_first = [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in CLASSIFIERS]
WITHOUT_NORMS = ("vgg16", "vgg19")
NEW = [*OF_LIBRARIES, "densenet161", "densenet264", "iresnet50", "iresnet101", "iresnet152"]


def of_library(name: str, **options: object) -> nn.Module:
    """The library's own, by its own function."""
    library, _, bare = OF_LIBRARIES[name].partition(".")
    if library == "timm":
        return timm.create_model(bare, **options)
    weights = {"weights": None, "weights_backbone": None} if name == DETECTOR else {"weights": None}
    return torchvision.models.get_model(bare, **weights, **options)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "gf" in n or "resnest" in n else ()) for n in NEW]
)
def test_nine_of_ten_batch_norms_are_in_a_fused_pass(name: str) -> None:
    fused, counted = fusedres.report(fusedres.fuse(source(name).on_meta())).norms_fused
    assert (counted == 0) == (name in WITHOUT_NORMS)
    assert fused >= 0.9 * counted


@pytest.mark.parametrize("name", small_first)
def test_the_librarys_state_dict_loads_strictly_and_gives_its_logits(name: str) -> None:
    """In fp64 as closely as rounding allows; in fp32 as the library's own, whose error fp64 tells."""
    torch.manual_seed(0)
    theirs = randomised(of_library(name, num_classes=3)).eval()
    with torch.no_grad():
        truth = theirs.double()(images(2, 3, 64, 64))
    single = theirs.float()
    for fused in (True, False):
        ours = create(name, num_classes=3, fused=fused).eval()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert any(isinstance(module, Fused) for module in ours.modules()) == (fused and name not in WITHOUT_NORMS)
        x = images(2, 3, 64, 64)
        with torch.no_grad():
            eager = relative_error(single(x.float()), truth)
            assert relative_error(ours(x.float()), truth) <= max(1.5 * eager, 4 * torch.finfo(torch.float32).eps)
            assert relative_error(ours.double()(x), truth) <= 1e-9


def test_the_plain_twin_is_the_librarys_network_of_the_same_seed() -> None:
    made = []
    for make in (
        lambda: of_library("mobilenet_v2"),
        *(lambda f=f: create("mobilenet_v2", fused=f) for f in (True, False)),
    ):
        torch.manual_seed(3)
        made.append(make())
    theirs, fused, plain = made
    assert type(plain) is type(theirs) and isinstance(fused, type(theirs))
    assert not any(isinstance(module, Fused) for module in plain.modules())
    for model in (fused, plain):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))


def seen(pixels: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of other sizes, and a box in each."""
    found = [images(3, pixels, pixels), images(3, pixels - 16, pixels + 16)]
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0]], dtype=torch.float64)
    return found, [{"boxes": boxes + i, "labels": torch.tensor([i + 1])} for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["auto", "moments"])
def test_a_step_and_detections_of_faster_rcnn_in_fp64_are_the_plain_twins(schedule: str) -> None:
    found, targets = seen(64)
    steps = []
    for fused in (True, False):
        torch.manual_seed(3)
        options = {"num_classes": 3, "min_size": 64, "max_size": 96}
        model = create(DETECTOR, fused=fused, **options).double().to(memory_format=torch.channels_last)
        if fused:
            fusedres.fuse(model, schedule=schedule)
        torch.manual_seed(5)  # which regions are sampled
        losses = model(found, targets)
        sum(losses.values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        with torch.no_grad():
            detections = model.eval()(found)
        steps.append((losses, grads, detections))
    (ours, our_grads, our_boxes), (theirs, their_grads, their_boxes) = steps
    for name, loss in theirs.items():
        assert relative_error(ours[name], loss) <= 1e-9, name
    largest = max(float(grad.norm()) for grad in their_grads.values())
    for name, grad in their_grads.items():
        assert relative_error(our_grads[name], grad, max(float(grad.norm()), 1e-6 * largest)) <= 1e-9, name
    for mine, other in zip(our_boxes, their_boxes, strict=True):
        assert len(other["boxes"]) > 0
        assert torch.equal(mine["labels"], other["labels"])
        assert relative_error(mine["boxes"], other["boxes"]) <= 1e-9


def test_weights_of_a_faster_rcnn_with_frozen_batch_norms_load_strictly() -> None:
    """As those are that torchvision publishes, which have no counters of batches."""
    detection = torchvision.models.detection
    with torch.device("meta"):
        frozen = torchvision.ops.FrozenBatchNorm2d
        backbone = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=frozen, trainable_layers=5
        )
        state = detection.FasterRCNN(backbone, 91).state_dict()
        ours = create(DETECTOR)
    lacking = ours.state_dict().keys() - state.keys()
    assert len(lacking) == 53 and all(key.endswith(".num_batches_tracked") for key in lacking)
    assert state.keys() <= ours.state_dict().keys()
    ours.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize(("name", "library"), [("resnest50", "timm"), ("vgg16", "torchvision")])
def test_a_library_that_is_not_installed_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == library else there(asked))
    assert name in names()
    for make in (create, source):
        with pytest.raises(ImportError, match=rf"^{library} not installed: pip install fusedres\[models\]$"):
            make(name)


def test_what_a_librarys_network_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        create("vgg16", num_classes=0)
    with pytest.raises(TypeError, match="colour"):
        create("mobilenet_v2", colour=3)
    assert all(source(name).takes == IMAGES for name in CLASSIFIERS)
    sides = {name: source(name).size[1] for name in CLASSIFIERS}
    assert sides == {name: entry(name).side for name in CLASSIFIERS}
