"""fusedres.swap.registry: fused classes derive from plain ones, and no library is imported for them."""

import inspect
import pickle
import subprocess
import sys

import pytest

from fusedres.nn.fused import Fused
from fusedres.swap.registry import families


def test_every_fused_class_derives_from_fused_and_then_from_its_plain_class():
    pytest.importorskip("torchvision")
    import torchvision.models.resnet  # noqa: F401

    known = families()
    names = [plain.__name__ for plain in known]
    assert set(names) >= {"ConvBNAct", "BasicBlock", "Bottleneck", "ResNet", "PreActBottleneck", "BNAct", "GatedBlock"}
    assert len(set(known.values())) == len(known)
    for plain, fused in known.items():
        assert issubclass(fused, plain) and issubclass(fused, Fused)
        order = inspect.getmro(fused)
        assert order.index(Fused) < order.index(plain), "the plain forward would hide the fused one"
        assert fused.__init__ is plain.__init__
        assert pickle.loads(pickle.dumps(fused)) is fused


def test_importing_the_library_imports_no_model_library():
    code = """
import sys, fusedres
from torch import nn
fusedres.report(fusedres.unfuse(fusedres.fuse(nn.Sequential(nn.Linear(1, 1), fusedres.nn.BasicBlock(3, 3)))))
imported = {name.split(".")[0] for name in sys.modules}
print(sorted(imported & {"torchvision", "timm", "matplotlib", "rich", "sklearn"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
