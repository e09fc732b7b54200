"""What `torch.jit.script` is given in the place of fused modules: twins of their plain classes."""

from torch import nn

OF_INSTANCES = (
    "fused_schedule", "fused_failure", "fused_reordered", "fused_weights", "fused_structures", "fused_unread",
    "fused_name", "fused_plan", "fused_online", "fused_choices", "fused_prepared",
)  # fmt: skip
"""What fused modules have of their own, beside their class."""


def twin_of_class(module: nn.Module, of: type[nn.Module]) -> nn.Module:
    """A module of another class that shares everything with this one but the tables of who is whose child.

    `torch.jit.script` puts what fused modules are to be compiled as into those tables.
    """
    twin: nn.Module = of.__new__(of)
    twin.__dict__.update(module.__dict__)
    for name in OF_INSTANCES:
        twin.__dict__.pop(name, None)
    twin.__dict__["_modules"] = {name: _with_own_children(child) for name, child in module._modules.items()}
    return twin


def _with_own_children(module: nn.Module | None) -> nn.Module | None:
    """A module itself, where it is prepared for scripting as a whole or holds nothing that is."""
    if module is None or hasattr(module, "__prepare_scriptable__"):
        return module
    holds = any(hasattr(inner, "__prepare_scriptable__") for inner in module.modules())
    return twin_of_class(module, type(module)) if holds else module
