r"""The laws inside a model's kernel: their free parameters, and where these start.

In: a GP whose kernel averages over orbits, starts in natural units. Out: values by the
paths of the model, checked. Next: ``invariance_gp`` fits from them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gpytorch.models import ExactGP
from torch import Tensor, nn

from gpbridge.augmentation.base import (
    Augmentation,
    BoundedAugmentation,
    check_elements,
    natural_name,
)
from gpbridge.inducing_covariances import has_orbits

Values = float | Sequence[float] | Tensor
Start = Values | Mapping[str, Values]


def free_laws(gp: nn.Module) -> dict[str, Augmentation]:
    """Laws of the kernel that have something to learn, by their paths."""
    kernels = {path: k for path, k in gp.named_modules() if has_orbits(k)}
    if not kernels:
        raise ValueError(
            f"The kernel of {type(gp).__name__} averages over no orbits. Put a "
            "gpbridge.kernels.InvariantKernel around its base kernel."
        )
    laws = {f"{path}.augmentation": k.augmentation for path, k in kernels.items()}
    laws = {path: law for path, law in laws.items() if free_names(law)}
    if not laws:
        raise ValueError(
            f"There is nothing to learn: no parameter of {', '.join(kernels)} has "
            "requires_grad in its augmentation. Call requires_grad_(True) on it, or "
            "fit the other hyperparameters with fit_gpytorch_mll."
        )
    for path, law in laws.items():
        check_elements(law, path)
    return laws


def free_names(law: Augmentation) -> list[str]:
    """Natural names of the free parameters of a law."""
    free = [name for name, p in law.named_parameters() if p.requires_grad]
    return [natural_name(name) for name in free]


def value_of(module: nn.Module, name: str) -> Tensor:
    """A copy of what has this name."""
    value = module
    for part in name.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value.detach().clone()


def _started(law: Augmentation, path: str) -> str:
    """The one thing of a law that a number without a name starts."""
    names = free_names(law)
    if "bound" in names:
        return "bound"
    if len(names) == 1:
        return names[0]
    raise ValueError(
        f"{path} has {', '.join(names)} to learn. Give starts by name, as "
        f"{{'{path}.{names[0]}': value}}."
    )


def default_starts(laws: dict[str, Augmentation], count: int) -> list[Start]:
    """Evenly spaced fractions of the caps, never at an end."""
    found = []
    for j in range(count):
        start = {}
        for path, law in laws.items():
            if not (
                isinstance(law, BoundedAugmentation) and "bound" in free_names(law)
            ):
                raise ValueError(
                    f"{path}, of type {type(law).__name__}, has no half-width with a "
                    "cap, below which starts could be spread. Pass starts."
                )
            fraction = (j + 0.5) / count
            start[f"{path}.bound"] = fraction * law.cap.detach().double()
        found.append(start)
    return found


def by_name(start: Start, laws: dict[str, Augmentation]) -> dict[str, Tensor]:
    """Values by their paths in the model."""
    known = {f"{path}.{name}" for path, law in laws.items() for name in free_names(law)}
    if not isinstance(start, Mapping):
        if len(laws) > 1:
            raise ValueError(
                f"The model has {len(laws)} laws to learn. Give each start by name: "
                f"{', '.join(sorted(known))}."
            )
        ((path, law),) = laws.items()
        start = {f"{path}.{_started(law, path)}": start}
    values = {}
    for name, value in start.items():
        full = [k for k in known if short_name(k, laws) == name or k == name]
        if not full:
            raise ValueError(
                f"starts names {name!r}, which is no free parameter of a law. There "
                f"are {', '.join(sorted(known))}."
            )
        values[full[0]] = torch.as_tensor(value, dtype=torch.float64).detach()
    return values


def check_starts(table: list[dict[str, Tensor]], gp: nn.Module) -> None:
    """Require values that the parameters can have.

    Raises:
        ValueError: If one cannot, or there are none.
    """
    if not table:
        raise ValueError("starts must hold at least one value of the law.")
    own = copy_of_model(gp)
    for number, start in enumerate(table):
        for name, value in start.items():
            try:
                own.initialize(**{name: value})
                finite = torch.isfinite(value_of(own, name)).all()
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"Start {number} cannot be: {name}: {error}"
                ) from error
            if not finite:
                raise ValueError(
                    f"Start {number} cannot be: {name} = {value.tolist()} is infinite."
                )


def copy_of_model(module: nn.Module) -> nn.Module:
    """A copy without what gpytorch keeps of predictions, which has no copy."""
    kept: dict[int, Any] = {}
    for part in module.modules():
        if isinstance(part, ExactGP) and part.prediction_strategy is not None:
            kept[id(part.prediction_strategy)] = None
        if hasattr(part, "_memoize_cache"):
            kept[id(part._memoize_cache)] = {}
    return copy.deepcopy(module, kept)


def short_name(name: str, laws: Mapping[str, Augmentation]) -> str:
    """The name inside the law, where there is one law only."""
    if len(laws) > 1:
        return name
    (path,) = laws
    return name.removeprefix(f"{path}.")


def learnt_values(model: nn.Module, laws: dict[str, Augmentation]) -> dict[str, Tensor]:
    """The free parameters of all laws, in natural units."""
    names = [f"{path}.{name}" for path, law in laws.items() for name in free_names(law)]
    return {short_name(name, laws): value_of(model, name) for name in names}
