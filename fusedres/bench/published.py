"""Published speeds that others reached, with what they measured and where they say so; none was measured here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusedres.bench.rows import OK, Row

__all__ = ["PUBLISHED", "Published", "beside"]

MLPERF_4 = "MLPerf Training 4.0"
MLPERF_2 = "MLPerf Training 2.0"
TIMM = "timm"


@dataclass(frozen=True)
class Published:
    """Images per second of one GPU on ResNet-50 at 224 px.

    Attributes:
        gpu: words that a device's name must hold.
        mode: train or infer.
        dtype: of the multiplications, or AMP where the source says no more.
        batch: per GPU; None where the source does not say.
        images_per_s: of one GPU.
        what: what ran.
        source: who says so.
    """

    gpu: tuple[str, ...]
    mode: str
    dtype: str
    batch: int | None
    images_per_s: float
    what: str
    source: str

    def on(self, device: str) -> bool:
        """Whether ``device`` is this GPU, by the words of its name."""
        name = device.upper().replace("-", " ")
        return all(word in name for word in self.gpu)


PUBLISHED = (
    Published(
        ("H200",), "train", "fp16", 400, 7950,
        "MXNet, NHWC, cuDNN's main-loop fusion, CUDA graphs", MLPERF_4,
    ),
    Published(
        ("H100",), "train", "fp16", 400, 7162,
        "MXNet, NHWC, cuDNN's main-loop fusion, CUDA graphs (SXM)", MLPERF_4,
    ),
    Published(("A100", "80GB"), "train", "fp16", 408, 3398, "MXNet, statistics fused", MLPERF_2),
    Published(("A100", "80GB"), "train", "fp16", 256, 2470, "PyTorch, AMP", "NVIDIA's PyTorch example"),
    Published(("A100",), "train", "AMP", None, 2035, "PyTorch eager", TIMM),
    Published(("A100",), "train", "AMP", None, 2050, "torch.compile", TIMM),
    Published(("RTX 3090",), "train", "AMP", None, 1218, "PyTorch eager, channels_last", TIMM),
    Published(("RTX 3090",), "train", "AMP", None, 826, "PyTorch eager, NCHW", TIMM),
    Published(("A100",), "infer", "fp16", 256, 15445, "AITemplate", "AITemplate"),
    Published(("A100",), "infer", "fp16", 256, 5026, "PyTorch eager", "AITemplate"),
)  # fmt: skip


def beside(rows: Iterable[Row], published: Sequence[Published] = PUBLISHED) -> list[tuple[Published, list[Row]]]:
    """Each published figure that a row's GPU has, with this machine's rows of ResNet-50 at 224 px in 16 bits."""
    timed = [
        row
        for row in rows
        if row.case == "resnet50" and row.px == 224 and row.status == OK and row.images_per_s is not None
    ]
    result = []
    for figure in published:
        ours = [row for row in timed if row.mode == figure.mode and row.dtype in ("fp16", "bf16")]
        ours = [row for row in ours if figure.on(row.device)]
        if ours:
            result.append((figure, sorted(ours, key=lambda row: -(row.images_per_s or 0.0))))
    return result
