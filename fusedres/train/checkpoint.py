"""Checkpoints that are whole or not there, and continue a training bit for bit."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Weights", "differences", "load", "random_state", "read_weights", "restore_random_state", "save", "write"]

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that `load` reads."""
    write(path, {"format": FORMAT, **state})


def write(path: Path, content: object) -> None:
    """`torch.save`, so that ``path`` is at any moment the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """The state in ``path``, on the CPU. Runs no code that the file may hold.

    Raises:
        ValueError: there is no such file, or it is truncated or no checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"resume: there is no checkpoint {path}")
    state = _read(path)
    if not isinstance(state, dict) or "config" not in state:
        raise ValueError(f"resume: {path} is no checkpoint of fusedres train")
    if state.get("format") != FORMAT:
        raise ValueError(f"resume: {path} has format {state.get('format')}, this version reads {FORMAT}")
    return state


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged archive raises whatever its damage leads to.
    except Exception as error:
        raise ValueError(f"{path} is truncated or not written by torch.save: {error}") from error


class Weights(NamedTuple):
    """What ``path`` holds: a state_dict, and of a checkpoint the configuration of its training (else None)."""

    path: Path
    state: dict[str, torch.Tensor]
    config: dict[str, Any] | None

    def give(self, model: torch.nn.Module) -> None:
        """Load them into ``model``.

        Raises:
            ValueError: they are of another network or number of classes; the model is unchanged.
        """
        check_weights(model, self.state, str(self.path))
        model.load_state_dict(self.state)


def read_weights(path: Path) -> Weights:
    """The weights in ``path``, a state_dict or a checkpoint. Runs no code that the file may hold.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    state, config = _read(path), None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state, config = state["model"], state.get("config")
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"weights: {path} holds no state_dict")
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"weights: {path}: config: expected that of a training, got {type(config).__name__}")
    return Weights(path, state, config)


def check_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise the ValueError that says how the weights ``state`` differ from those of ``model``."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"{source}: weights of another network: it lacks {_some(missing)} and has {_some(unknown)} besides"
        )
    odd = [name for name in own if own[name].shape != state[name].shape]
    if not odd:
        return
    last = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1:]
    if last and {name.rpartition(".")[0] for name in odd} == set(last):
        expected, got = (len(weights[f"{last[0]}.weight"]) for weights in (own, state))
        raise ValueError(f"{source}: classes: expected weights for {expected}, got some for {got}")
    name = odd[0]
    raise ValueError(f"{source}: {name}: expected shape {tuple(own[name].shape)}, got {tuple(state[name].shape)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Where two sets of hyper-parameters differ, in words; nested ones named with dots."""
    old, new = flat(saved), flat(wanted)
    return [
        f"{name}: was {old.get(name)!r}, now {new.get(name)!r}"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = tuple(value) if isinstance(value, list) else value
    return result


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of Python, NumPy (if it is in use) and torch, in types that `load` takes."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(name), [int(key) for key in keys], *(float(value) for value in rest))
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the generators to ``state``."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy as np

        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
