"""fusedres.runtime.logs: what is decided is logged; printed where FUSEDRES_LOG says so, and nothing without it."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fusedres
from fusedres.patterns.choose import forget_choices
from fusedres.runtime import fallback, logs
from fusedres.runtime.launch import LaunchFailed

CODE = """
import torch, fusedres
fusedres.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()))
"""


@pytest.mark.parametrize(("level", "lines"), [(None, 0), ("INFO", 1)])
def test_the_environment_says_what_is_printed(level, lines):
    environment = {name: value for name, value in os.environ.items() if name != "FUSEDRES_LOG"}
    environment |= {} if level is None else {"FUSEDRES_LOG": level}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("fusedres.swap.swap: Sequential: 1 modules are fused, schedule auto\n") == lines
    assert done.stdout == ""


def test_a_wrong_level_is_said_and_the_right_one_replaces_it():
    logger = logging.getLogger("fusedres")
    before = logger.level, list(logger.handlers)
    try:
        with pytest.warns(UserWarning, match="FUSEDRES_LOG: expected one of debug, info, warning, error, got 'loud'"):
            logs.set_up("loud")
        for _ in range(2):
            logs.set_up("error")
        ours = [handler for handler in logger.handlers if handler.get_name() == logs.__name__]
        assert [type(handler) for handler in ours] == [logging.StreamHandler] and logger.level == logging.ERROR
    finally:
        logger.level, logger.handlers[:] = before


def test_choices_are_logged(caplog):
    forget_choices()
    block = fusedres.nn.BasicBlock(16, 16).to("meta")
    with caplog.at_level(logging.INFO, "fusedres"), fusedres.record():
        block(torch.empty(8, 16, 32, 32, device="meta"))
    words = [record.getMessage() for record in caplog.records if record.name == "fusedres.patterns.choose"]
    assert words and all(one.startswith("chain of (8, 16, 32, 32): ") for one in words)


def test_a_kernel_that_can_not_start_is_logged_each_time(caplog, monkeypatch):
    monkeypatch.setattr(fallback.switches, "STRICT", False)
    monkeypatch.setattr(fallback, "_warned", set())
    module = fusedres.fuse(nn.Sequential(fusedres.nn.BasicBlock(8, 8)))[0]
    failure = LaunchFailed("some_kernel", "cuda:0", RuntimeError("no such image"))
    with caplog.at_level(logging.WARNING, "fusedres"), pytest.warns(UserWarning, match="some_kernel"):
        for _ in range(2):
            fallback.give_up(module, failure)
    said = [record.getMessage() for record in caplog.records if record.name == fallback.__name__]
    assert said == [f"0 runs its plain modules: {failure}"] * 2
    assert torch.isfinite(module(torch.randn(1, 8, 8, 8))).all()
