"""A parameter of a model in natural units, by its name.

In: a name with dots, as in ``covar_module.base_kernel.lengthscale``. Out: a function
that sets it, and its value. Next: ``scan`` varies it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Setter = Callable[[nn.Module, float], object]


def setter_of(name: str) -> Setter:
    """A function that sets the parameter, in natural units.

    Args:
        name: As ``model.initialize`` takes it.

    Returns:
        The function; it raises a ValueError for a name that the model does not have,
        and for a value out of bounds.
    """

    def set_value(model: nn.Module, value: float) -> None:
        try:
            # A Python float would pass through float32.
            model.initialize(**{name: torch.tensor(value, dtype=torch.float64)})
        except AttributeError as error:
            known = [n.replace("raw_", "") for n, _ in model.named_parameters()]
            raise ValueError(
                f"The model has no parameter {name!r}. It has {', '.join(known)}."
            ) from error
        except RuntimeError as error:
            raise ValueError(f"{name} cannot be {value:g}: {error}") from error

    return set_value


def read(model: nn.Module, name: str) -> float | list[float]:
    """Its value in natural units; a list where it has several that differ."""
    value = model
    for part in name.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    numbers = value.detach().reshape(-1).tolist()
    return numbers[0] if len(set(numbers)) == 1 else numbers
