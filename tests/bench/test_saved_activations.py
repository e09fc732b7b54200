"""fusedres.bench.saved_activations: counts that can be done by hand."""

import pytest
import torch
from torch import nn

from fusedres.bench.saved_activations import main
from fusedres.traffic.saved import SavedBytes, per_image, saved_bytes


class Squares(nn.Module):
    """conv (saves its input), square (saves its input, the conv's output), sum (saves nothing)."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1, bias=False, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).square().sum()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_storage_is_counted_once_and_parameters_not_at_all(device):
    x = torch.zeros(2, 3, 4, 6, device=device)
    counted = saved_bytes(Squares(device), lambda model: model(x))
    assert counted.by_dtype == {torch.float32: 4 * (2 * 3 * 4 * 6 + 2 * 5 * 4 * 6)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_saved_twice_is_counted_once(device):
    x = torch.zeros(8, device=device, requires_grad=True)
    counted = saved_bytes(nn.Identity(), lambda model: (model(x) * x + x.square()).sum())
    assert counted.total == 8 * 4


def test_a_view_counts_the_whole_storage_that_it_keeps_alive():
    x = torch.zeros(100, requires_grad=True)
    assert saved_bytes(nn.Identity(), lambda _: (x * 1.0)[:10].square().sum()).total == 400


def test_freed_storages_are_not_mistaken_for_one_another():
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                x = x.sin()  # saves its input, whose Python object dies at once
            return x.sum()

    x = torch.zeros(1000, requires_grad=True)
    assert saved_bytes(Chain(), lambda model: model(x)).total == 20 * 4000


def test_buffers_are_left_out_and_batch_norm_keeps_mean_and_invstd():
    x = torch.zeros(2, 3, 4, 4)
    counted = saved_bytes(nn.BatchNorm2d(3), lambda model: model(x).sum())
    assert counted.total == 4 * (x.numel() + 3 + 3)


def test_tensors_kept_on_a_context_are_counted():
    class Hoarder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = {"mask": [torch.zeros(7, dtype=torch.uint8)]}
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    x = torch.zeros(3, requires_grad=True)
    assert saved_bytes(nn.Identity(), lambda _: Hoarder.apply(x).sum()).by_dtype == {torch.uint8: 7}


def test_conversion_to_bf16_leaves_integers_alone():
    counted = SavedBytes({torch.float32: 400, torch.float64: 80, torch.int64: 24, torch.bool: 5})
    assert counted.as_dtype(torch.bfloat16) == 200 + 20 + 24 + 5
    assert counted.total == 509


def test_slope_and_fixed_part_are_told_apart():
    def loss(model: nn.Module, batch: int) -> torch.Tensor:
        return model(torch.zeros(batch, 3, 4, 4)).sum()

    line = per_image(nn.BatchNorm2d(3), loss, 2)
    assert line.slope.by_dtype == {torch.float32: 4 * 3 * 16}
    assert line.fixed.by_dtype == {torch.float32: 4 * 6}


def test_batch_below_one_is_refused():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        per_image(nn.Identity(), lambda model, batch: torch.zeros(batch), 0)


def test_resnet50_saves_less_than_half_of_eager(capsys):
    """bf16 elements per image at 224 px; 43.8 is eager's sum by hand over all layers."""
    pytest.importorskip("torchvision")
    assert main(["--model", "resnet50", "--batch", "2", "--px", "224", "--schedule", "moments"]) == 0
    output = capsys.readouterr().out
    print(output)
    megabytes = {line.split()[0]: float(line.split()[-3]) for line in output.splitlines()[-2:]}
    assert megabytes["eager"] == pytest.approx(43.8, abs=0.1)
    assert megabytes["fused"] <= 20.5


def test_an_absent_device_is_a_usage_error(capsys):
    pytest.importorskip("torchvision")
    with pytest.raises(SystemExit) as exit_:
        main(["--device", "cuda:99"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "device: expected cpu" in message and ", meta" in message and "got 'cuda:99'" in message


def test_unknown_model_is_a_usage_error(capsys):
    pytest.importorskip("torchvision")
    with pytest.raises(SystemExit) as exit_:
        main(["--model", "resnet49"])
    assert exit_.value.code == 2
    assert "resnet49" in capsys.readouterr().err
