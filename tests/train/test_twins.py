"""fusedres.train.twins: they compute the same numbers, and the checks can fail."""

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from matplotlib.figure import Figure

from fusedres.models.network import FusedResNet, ResNet
from fusedres.nn import BasicBlock, plain
from fusedres.train.digits import load_digits
from fusedres.train.twins import ForeignCheck, Predicted, draw, saved_by, train_twins


@pytest.fixture(scope="module")
def twins():
    calls = {"steps": 0, "epochs": []}

    def count() -> None:
        calls["steps"] += 1

    trained = train_twins(
        load_digits(),
        epochs=1,
        batch=128,
        seed=0,
        on_step=count,
        on_epoch=lambda epoch, _: calls["epochs"].append(epoch),
    )
    assert calls == {"steps": 11, "epochs": [0]}
    return trained


def test_losses_of_the_twins_agree(twins):
    assert [len(twin.losses) for twin in twins] == [11, 11, 11]
    # The first step differs by the rounding of one forward, the next ones by what training makes of it.
    assert twins.fused.losses[0] == pytest.approx(twins.plain.losses[0], rel=1e-6)
    assert twins.fused.losses[:3] == pytest.approx(twins.plain.losses[:3], rel=1e-4)


def test_all_twins_learn(twins):
    for twin in twins:
        assert twin.losses[-1] < 0.8 * twin.losses[0]
        assert len(twin.seconds) == 11
        assert all(seconds > 0 for seconds in twin.seconds)
        assert 0 <= twin.accuracy <= 1


def test_twins_differ_in_blocks_and_memory_format_alone(twins):
    kinds = [{type(m) for m in twin.model.modules()} for twin in twins]
    assert BasicBlock in kinds[1]
    own = {BasicBlock, FusedResNet}
    assert kinds[0] == kinds[2] == kinds[1] - own | {plain.BasicBlock, ResNet}
    formats = [twin.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) for twin in twins]
    assert formats == [True, True, False]


def test_saved_bytes_fall_and_the_models_are_left_alone(twins):
    digits = load_digits()
    saved = saved_by(twins.plain.model, twins.fused.model, digits.train_images[:32], digits.train_labels[:32])
    assert list(saved) == ["plain", "fused"]
    assert saved["fused"] < 0.8 * saved["plain"]
    for twin in twins:
        assert twin.model.bn1.num_batches_tracked == 11


@pytest.mark.parametrize(
    ("output", "gradient", "passed"),
    [
        (1.0, 1.0, True),
        (1.5, 1.5, True),
        (1.6, 1.0, False),
        (1.0, 1.6, False),
        (float("nan"), 1.0, False),
        (1.0, float("nan"), False),
    ],
)
def test_check_passes_only_within_the_factor_of_eager(output, gradient, passed):
    check = ForeignCheck("", {"eager": 1.0, "fused": output}, {"eager": 1.0, "fused": gradient}, {})
    assert check.passed is passed


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "kept"), [("auto", 1.01), ("memory", 0.6)])
def test_resnet50_is_as_accurate_as_eager(schedule, kept):
    pytest.importorskip("torchvision")
    from fusedres.train.twins import check_resnet50

    check = check_resnet50(0, schedule=schedule, repeats=3)
    assert check.passed
    assert check.output_error["eager"] < 1e-3
    assert check.saved_per_image["fused"] < kept * check.saved_per_image["plain"]


def test_every_line_of_the_picture_is_drawn_within_its_axes(twins, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    same = twins._replace(fused=twins.plain)  # differences of 0, which a logarithm has no place for
    check = ForeignCheck("", {}, {}, {"plain": 2e6, "fused": 1e6})
    draw(tmp_path / "x.png", same, {"plain": 2e6, "fused": 1e6}, check, Predicted("", "h100", {"plain": 2.0}), batch=8)
    losses, apart, *bars = drawn[0].axes
    assert len(bars) == 3 and "predicted, not measured" in bars[-1].get_title()
    assert all("measured" in axes.get_title() and "predicted" not in axes.get_title() for axes in bars[:2])
    for axes in (losses, apart):
        low, high = axes.get_ylim()
        assert len(axes.lines) == 2
        for line in axes.lines:
            assert all(low <= value <= high for value in line.get_ydata())


def test_what_is_predicted_is_that_of_explain():
    from fusedres.commands.demo import predicted

    told = predicted()
    assert f"{told.ms['plain'] / told.ms['fused']:.2f} x eager" in told.sentence and told.gpu == "h100"
