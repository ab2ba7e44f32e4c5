"""The one-point probe: is a network a function that can be linearised?

In: a :class:`~gpbridge.frozen.FrozenNet` and the first inputs it meets. Out: its number
of outputs, the size of its backward pass, and which transforms of torch.func trace it,
kept on the net; or an error that says what is in the way.
Next: ``functional`` offers it as a method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import vmap

from gpbridge.checks import ShapeError, warn_user
from gpbridge.frozen import FrozenNet, first_line
from gpbridge.jacobians import jacobian, jvp, looped_jacobian
from gpbridge.types import Params


def probe_network(net: FrozenNet, X: Tensor) -> int:
    """Check a network on up to three points; see :meth:`FunctionalNet.probe`.

    Args:
        net: The network; what is found out is kept on it.
        X: Inputs ``... x n x d``.

    Returns:
        The number of outputs m.
    """
    rows = X.detach().reshape(-1, X.shape[-1])[:3].to(net.dtype)
    _check_shape(net, X)
    with torch.inference_mode(False):
        rows = rows.clone()
        with torch.no_grad():
            net._num_outputs = _probe_values(net, rows)
        net.num_activations = _count_activations(net, rows[:1])
        _probe_derivative(net, rows)
        _probe_tracing(net, rows[:1])
    return net._num_outputs


def _check_shape(net: FrozenNet, X: Tensor) -> None:
    if X.numel() == 0:
        raise ShapeError(
            f"The network is probed on the first points it sees, but X is empty (shape "
            f"{tuple(X.shape)}). Call it once with data."
        )
    if net.input_shape is not None:
        check_input_shape(net.input_shape, X)


def check_input_shape(shape: Sequence[int], X: Tensor) -> None:
    """Require inputs ``... x d`` with as many columns as one input has entries."""
    if math.prod(shape) != X.shape[-1]:
        raise ShapeError(
            f"input_shape {shape} has {math.prod(shape)} entries, but X has "
            f"{X.shape[-1]} columns (shape {tuple(X.shape)}). Flatten each input to a "
            "row."
        )


def _probe_values(net: FrozenNet, rows: Tensor) -> int:
    before = {k: v.clone() for k, v in net.network.state_dict().items()}
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        batch = net.input_shape or rows.shape[-1:]
        inputs = rows.reshape(-1, *batch)
        outputs = run_or_explain(net.network, inputs, net.input_shape)
        again = net.network(inputs)
    after = net.network.state_dict()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    if changed:
        net.network.load_state_dict(before)
        raise ValueError(
            f"The network changes itself in forward: {changed} moved, in eval mode. "
            "A kernel must be a function of its inputs; remove the update from forward."
        )
    num_outputs = check_outputs(outputs, inputs)
    if not torch.isfinite(outputs).all():
        raise ValueError(
            "The network returns NaN or Inf on the first rows. Check its weights and "
            "the scale of the inputs."
        )
    if not torch.equal(outputs, again):
        raise ValueError(
            "The network returns different values for the same inputs in eval mode, so "
            "it draws fresh randomness per call. Fix the noise, or use a dropout "
            "posterior."
        )
    alone = net.network(rows[:1].reshape(-1, *batch)).reshape(-1)
    if alone.numel() != outputs[0].numel():
        raise ShapeError(
            f"One row alone gives {alone.numel()} numbers, but a row among {len(rows)} "
            f"gives {outputs[0].numel()}. Return one row of outputs per point."
        )
    size = outputs.abs().max().clamp_min(1e-30)
    if len(rows) > 1 and (alone - outputs[0].reshape(-1)).abs().max() > 1e-3 * size:
        raise ValueError(
            "The network mixes rows: f(X)[0] differs from f(X[:1]). A kernel needs "
            "outputs that depend on their own row only (batch statistics, attention or "
            "pooling over the batch do not)."
        )
    return num_outputs


def run_or_explain(
    network: nn.Module, inputs: Tensor, input_shape: Sequence[int] | None = None
) -> Tensor:
    """Run a network, and say which widths may disagree where it fails.

    Args:
        network: The network.
        inputs: ``n x d``, or ``n x input_shape``.
        input_shape: Shape that rows of ``d`` columns were given, or None.

    Returns:
        Whatever the network returns.

    Raises:
        ShapeError: If the forward pass fails.
        RuntimeError: If the failure says more: out of memory, not implemented, weights
            on another device.
    """
    try:
        return network(inputs)
    except RuntimeError as error:
        first = next(network.parameters(), inputs)
        if type(error) is not RuntimeError or inputs.device != first.device:
            raise
        raise ShapeError(_misfit(network, inputs, input_shape, error)) from error


@torch.no_grad()
def explain_failure(net: FrozenNet, X: Tensor) -> None:
    """Say what is in the way of a network that failed at inputs, if a plain pass can.

    Args:
        net: The network, at its own weights.
        X: Inputs ``... x n x d``.

    Raises:
        TypeError: If the output is not one tensor.
        ShapeError: If inputs do not fit the network, or outputs are not one row each.
    """
    if not isinstance(X, Tensor) or X.numel() == 0:
        return
    _check_shape(net, X)
    rows = X.detach().reshape(-1, *(net.input_shape or X.shape[-1:]))[:2]
    rows = rows.to(net.dtype)
    check_outputs(run_or_explain(net.network, rows, net.input_shape), rows)


def warn_looped(error: Exception) -> None:
    """Say that draws are evaluated one by one since ``vmap`` raised this."""
    warn_user(
        "torch.func.vmap cannot evaluate the draws side by side: "
        f"{first_line(error)} They are evaluated one by one, which is slower. Replace "
        "what depends on values, as an if or .item(), by torch.where."
    )


def check_outputs(outputs: object, inputs: Tensor) -> int:
    """Require one row of outputs per row of inputs.

    Args:
        outputs: What the network returned.
        inputs: What it was given, ``n x ...``.

    Returns:
        The number of outputs m.

    Raises:
        TypeError: If it is not one tensor.
        ShapeError: If it is neither ``n x m`` nor ``n``.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "The network must return one tensor, but returns "
            f"{type(outputs).__name__}. Wrap it in a module whose forward picks the "
            "tensor of outputs."
        )
    if outputs.dim() not in (1, 2) or len(outputs) != len(inputs):
        raise ShapeError(
            f"The network must return ``n x m`` or ``n``, but {len(inputs)} rows of "
            f"{tuple(inputs.shape[1:])} gave {tuple(outputs.shape)}. Flatten the "
            "output, or pass input_shape if inputs have to be unflattened."
        )
    return 1 if outputs.dim() == 1 else outputs.shape[1]


def _misfit(
    network: nn.Module,
    inputs: Tensor,
    input_shape: Sequence[int] | None,
    error: RuntimeError,
) -> str:
    """What the network was given and what its layers take."""
    shape = "" if input_shape is None else f", unflattened to {tuple(input_shape)}"
    expected = _expected_width(network, inputs)
    return (
        f"The network fails on an X of {inputs[0].numel()} columns{shape}: "
        f"{first_line(error).rstrip('.')}. {expected}Pass the columns that the network "
        "was trained on, and input_shape=(c, h, w) if it wants images."
    )


def _expected_width(network: nn.Module, inputs: Tensor) -> str:
    """What the first layer that its inputs do not fit takes, or nothing."""
    found: list[str] = []
    names = {module: name for name, module in network.named_modules()}

    def compare(module: nn.Module, args: tuple) -> None:
        if found or not args or not isinstance(args[0], Tensor):
            return
        got = tuple(args[0].shape)
        if isinstance(module, nn.Linear):
            fits = got[-1:] == (module.in_features,)
            wanted = f"``... x {module.in_features}``"
        else:
            axes = {1: "l", 2: "h x w", 3: "d x h x w"}[len(module.kernel_size)]
            dims = 2 + len(module.kernel_size)
            fits = len(got) == dims and got[1] == module.in_channels
            wanted = f"``n x {module.in_channels} x {axes}``"
        if not fits:
            name = f"layer {names[module]!r}" if names[module] else "one layer"
            kind = type(module).__name__
            found.append(f"Its {name}, {kind}, takes {wanted}, but got {got}. ")

    handles = [
        module.register_forward_pre_hook(compare)
        for module in names
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    try:
        network(inputs)
    except RuntimeError:  # the error that is to be explained
        pass
    finally:
        for handle in handles:
            handle.remove()
    return "".join(found)


def _count_activations(net: FrozenNet, row: Tensor) -> int:
    """How many numbers autograd keeps of one point, weights excluded."""
    params = {k: p.detach().clone().requires_grad_() for k, p in net.params.items()}
    weights = {p.data_ptr() for p in [*params.values(), *net.network.parameters()]}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if value.data_ptr() not in weights:
            kept[value.data_ptr()] = value.numel()
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
    with torch.enable_grad(), hooks:
        net.apply_network(params, row)
    return sum(kept.values())


def _probe_derivative(net: FrozenNet, rows: Tensor) -> None:
    # Differentiate with plain autograd first: it says which weights are not reached.
    params = {
        name: p.detach().clone().requires_grad_() for name, p in net.params.items()
    }
    with torch.enable_grad():
        total = net.apply_network(params, rows).sum()
    if not total.requires_grad:
        raise ValueError(
            "The network's output does not depend on its random weights in a "
            "differentiable way (detach, no_grad, rounding or argmax in forward?), so "
            "it has no tangent. Return the differentiable output."
        )
    try:
        grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            "The network cannot be differentiated in its random weights: "
            f"{first_line(error)} Look for operations in place in its forward."
        ) from error
    unused = [n for n, g in zip(params, grads, strict=True) if g is None]
    if len(unused) == len(params) or all(
        g is None or bool((g == 0).all()) for g in grads
    ):
        if not _has_any_slope(net, rows, params):
            raise ValueError(
                "The network's output has zero derivative in every random weight at "
                "the first rows (detach, rounding or argmax in forward, or only dead "
                "units?), so it has no tangent. Return the differentiable output."
            )
    if unused:
        warn_user(
            f"The output does not reach the weights {unused}; they do not contribute "
            "to the kernel. Exclude them with parameters=, or check forward."
        )


def _has_any_slope(net: FrozenNet, rows: Tensor, params: Params) -> bool:
    # Summed gradients can cancel (softmax outputs sum to a constant): look per output.
    J = looped_jacobian(net, rows, params)
    return bool((J != 0).any())


def _probe_tracing(net: FrozenNet, row: Tensor) -> None:
    """Choose the transforms of torch.func that reproduce plain autograd at a point.

    Compared are products with the Jacobian and their derivative in the inputs, which
    acquisition functions need.
    """
    generator = torch.Generator(row.device).manual_seed(0)
    tangent = torch.randn(
        net.num_params, generator=generator, dtype=row.dtype, device=row.device
    )

    def rows_of_jacobian(x: Tensor) -> Tensor:
        return jacobian(net, x) @ tangent

    def product(x: Tensor) -> Tensor:
        return vmap(lambda v: jvp(net, x, v))(tangent[None])[0]

    net.vectorized = net.forward_mode = False
    plain = _value_and_slope(rows_of_jacobian, row)
    net.vectorized = True
    problem = _disagreement(rows_of_jacobian, row, plain)
    if problem is None:
        for net.forward_mode in (True, False):
            problem = _disagreement(product, row, plain)
            if problem is None:
                return
    # Data-dependent control flow, an autograd.Function without a vmap rule: it still
    # works one point at a time.
    net.vectorized = False
    warn_user(
        "torch.func cannot vectorise this network, so Jacobians are computed one "
        f"point at a time, which is slow: {problem} Avoid data-dependent control flow; "
        "give a custom autograd.Function setup_context and generate_vmap_rule."
    )


def _value_and_slope(
    route: Callable[[Tensor], Tensor], row: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A product at one point, and its derivative in the inputs where there is one."""
    x = row.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = route(x)
        # Unequal weights, because outputs such as probabilities sum to a constant.
        weights = torch.arange(1.0, value.numel() + 1).cos().to(value)
        total = value.reshape(-1) @ weights
    if not total.requires_grad:  # as after a ReLU network
        return value.detach(), torch.zeros_like(row)
    try:
        (slope,) = torch.autograd.grad(total, x, allow_unused=True)
    except (RuntimeError, NotImplementedError):  # no second derivative
        return value.detach(), None
    return value.detach(), torch.zeros_like(row) if slope is None else slope


def _disagreement(
    route: Callable[[Tensor], Tensor],
    row: Tensor,
    plain: tuple[Tensor, Tensor | None],
) -> str | None:
    try:
        traced = _value_and_slope(route, row)
    except Exception as error:  # torch.func raises what it likes
        return first_line(error)
    for name, exact, got in zip(("values", "slopes"), plain, traced, strict=True):
        if exact is None:
            continue
        if got is None or _far(got.reshape(exact.shape), exact):
            return f"its {name} differ from those of plain autograd."
    return None


def _far(got: Tensor, exact: Tensor) -> bool:
    return bool((got - exact).abs().max() > 1e-2 * exact.abs().max())
