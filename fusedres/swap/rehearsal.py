"""What `fuse` would make of a model, tried on other modules around the same tensors and settings."""

from typing import Any

import torch
from torch import nn


def stand_in(model: nn.Module) -> nn.Module:
    """Modules built and joined as those of a model, whose classes may be changed: all else is that of the model.

    They are not meant to be called: what was put in the place of a method of one module still is that module's.
    """
    made: dict[int, Any] = {}

    def of(module: Any) -> Any:
        if id(module) not in made:
            if isinstance(module, torch.jit.ScriptModule):  # which is no Python object to be built again
                made[id(module)] = module
            else:
                twin = made[id(module)] = object.__new__(type(module))
                twin.__dict__.update(module.__dict__)
                twin.__dict__["_modules"] = {
                    name: None if child is None else of(child) for name, child in module._modules.items()
                }
        return made[id(module)]

    twin: nn.Module = of(model)
    return twin
