"""fusedres.bench.steps: on which GPU a step is captured, on stand-ins for those that need not be here."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from fusedres.bench.steps import Step, graph_step
from fusedres.measure.accuracy import Observed

SECOND = torch.device("cuda", 1)


class Cuda:
    """What `torch.cuda` does for a capture; ``used`` is (what, current device, current stream's device) of each use."""

    def __init__(self, monkeypatch):
        self.device = torch.device("cuda", 0)
        self.streams = {}
        self.used = []
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"in_{name}"))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.note("replay")))

    def new_stream(self, device):
        return SimpleNamespace(device=device, wait_stream=lambda other: self.waits(device, other.device))

    def waits(self, device, other):
        assert device == other, "streams of two GPUs wait for each other"

    def current_stream(self, device):
        return self.streams.get(device) or self.new_stream(device)

    def note(self, what):
        stream = self.streams.get(self.device)
        self.used.append((what, self.device, None if stream is None else stream.device))

    @contextmanager
    def in_device(self, device):
        before, self.device = self.device, device
        yield
        self.device = before

    @contextmanager
    def in_stream(self, stream):
        with self.in_device(stream.device):
            before = self.streams.get(stream.device)
            self.streams[stream.device] = stream
            yield
            self.streams[stream.device] = before

    @contextmanager
    def in_graph(self, graph, stream=None):
        # As PyTorch does, which makes the stream of its own once for a process.
        with self.in_stream(stream or self.new_stream(torch.device("cuda", 0))):
            self.note("begin")
            yield
            self.note("end")


def test_warm_up_and_capture_are_on_the_gpu_asked_for(monkeypatch):
    cuda = Cuda(monkeypatch)
    model = nn.Linear(2, 2)
    weight = model.weight.detach().clone()

    def run():
        cuda.note("step")
        with torch.no_grad():
            model.weight += 1
        return model.weight

    graphed = graph_step(Step(run, lambda: Observed({}, {}), model), SECOND)
    names = ["step", "step", "step", "begin", "step", "end"]
    assert cuda.used == [(name, SECOND, SECOND) for name in names]
    assert cuda.device == torch.device("cuda", 0) and cuda.streams == {SECOND: None}
    # The first replay starts where the plain step would.
    assert torch.equal(model.weight, weight)
    graphed.run()
    assert cuda.used[-1][0] == "replay"
