"""Networks as functions of (weights, inputs), and their derivatives in the weights.

In: a trained ``nn.Module``. Out: a :class:`FunctionalNet`, which owns a frozen copy and
knows which weights are random, and free functions for its Jacobian and the products
with it. Which weights are random is decided here and nowhere else.
Next: ``operators`` offers the products as matrices, ``features`` the Gram matrices.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from gpbridge.checks import ShapeError
from gpbridge.tracing import traceable
from gpbridge.types import Apply, Params

Parameters = str | Sequence[str] | Callable[[str], bool]

JACOBIAN_BYTES = 256 * 2**20  # one chunk of a Jacobian, workspace included


class FunctionalNet(nn.Module):
    r"""A network as a function :math:`f(x, w)` of its random weights and its inputs.

    Owns a deep copy of ``network`` in eval mode, so that batch-norm statistics and
    dropout are fixed, without the caller's hooks; the caller's module is never changed.
    ``.train()`` leaves the copy in eval mode. Inputs are ``... x n x d``, outputs
    ``... x n x m``. The number of outputs is known once :meth:`probe` has seen a point.

    Args:
        network: Any module that maps ``n x d`` (or ``n x input_shape``) to ``n x m`` or
            ``n``, row by row and without fresh randomness.
        parameters: Which weights are random: ``"all"``, ``"last_layer"``, names of
            parameters or of submodules, or a predicate on parameter names. Weights with
            ``requires_grad=False`` never are; tied weights count once.
        input_shape: Shape of one input, to unflatten the ``d`` columns, as (c, h, w).
        freeze: False leaves the weights of the copy trainable, for kernels learned
            through their network.

    Raises:
        TypeError: If ``network`` is not a module.
        ValueError: If no random weight is left or a name is unknown.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Parameters = "all",
        input_shape: Sequence[int] | None = None,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"network must be a torch.nn.Module, but is {type(network).__name__}."
            )
        self.names = _random_names(network, parameters)
        self.was_training = network.training
        self.network = _frozen_copy(network, freeze, self.names)
        self.freeze = freeze
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.vectorized = True
        self.forward_mode = True
        self.num_activations = 0  # numbers that one point's backward pass keeps
        self.layer_names: tuple[str, ...] | None = None  # filled by layer_gram
        self._num_outputs: int | None = None
        self.register_buffer("weight_scale", None)

    @property
    def params(self) -> Params:
        """The random weights by name."""
        own = dict(self.network.named_parameters())
        return {name: own[name] for name in self.names}

    @property
    def num_params(self) -> int:
        """The number p of random weights."""
        return sum(p.numel() for p in self.params.values())

    @property
    def num_outputs(self) -> int:
        """The number m of outputs.

        Raises:
            RuntimeError: If no point was probed yet.
        """
        if self._num_outputs is None:
            raise RuntimeError(
                "The number of outputs is not known before the network has seen a "
                "point. Call probe(X) first."
            )
        return self._num_outputs

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.network.parameters()).dtype

    def apply_network(self, params: Params, X: Tensor) -> Tensor:
        """Evaluate ``... x n x d`` inputs at given weights, ``... x n x m``.

        Weights and buffers that are not given follow the dtype of ``X``, so that a
        float32 network can be evaluated in float64.

        Args:
            params: Weights by name; those that are not given keep their own values.
            X: Inputs.

        Returns:
            The outputs.
        """
        rows = X.reshape(-1, *(self.input_shape or X.shape[-1:]))
        if X.dtype != self.dtype:
            params = {**self._state_in(X.dtype), **params}
        with traceable():
            outputs = functional_call(self.network, params, (rows,))
        return outputs.reshape(*X.shape[:-1], -1 if rows.numel() else self.num_outputs)

    def _state_in(self, dtype: torch.dtype) -> Params:
        state = [*self.network.named_parameters(), *self.network.named_buffers()]
        return {k: v.to(dtype) for k, v in state if v.is_floating_point()}

    def forward(self, X: Tensor) -> Tensor:
        """The network at its own weights, ``... x n x m``."""
        return self.apply_network({}, X)

    def train(self, mode: bool = True) -> FunctionalNet:
        """Set the mode of everything but the network, which stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def flatten(self, params: Params) -> Tensor:
        """Concatenate weights, each ``... x shape``, to ``... x p``."""
        parts = []
        for name, own in self.params.items():
            value = params[name]
            batch = value.shape[: value.dim() - own.dim()]
            parts.append(value.reshape(*batch, own.numel()))
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> Params:
        """Split ``... x p`` into weights by name, each ``... x shape``."""
        shapes = {name: p.shape for name, p in self.params.items()}
        parts = vector.split([math.prod(s) for s in shapes.values()], dim=-1)
        return {
            name: part.reshape((*vector.shape[:-1], *shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def probe(self, X: Tensor) -> int:
        """Check on up to three points that the network is a function we can linearise.

        Args:
            X: Inputs ``... x n x d``, at least one point.

        Returns:
            The number of outputs m.

        Raises:
            TypeError: If the output is not one tensor.
            ShapeError: If the output is not one row per point, or X has no points or
                another width than ``input_shape``.
            ValueError: If the network draws randomness, changes itself, mixes rows, or
                cannot be differentiated in its random weights.
        """
        rows = X.detach().reshape(-1, X.shape[-1])[:3].to(self.dtype)
        _check_probe_shape(self, X)
        with torch.inference_mode(False):
            rows = rows.clone()
            with torch.no_grad():
                self._num_outputs = _probe_values(self, rows)
            self.num_activations = _count_activations(self, rows[:1])
            _probe_derivative(self, rows)
            _probe_tracing(self, rows[:1])
        return self._num_outputs

    def set_weight_scale(self, scale: Tensor | None) -> None:
        """Keep a standard deviation per weight, ``p``, beside the prior variance.

        Part of the state: it was measured on data and a loaded model needs it.
        """
        self.register_buffer("weight_scale", scale)

    def extra_repr(self) -> str:
        """How many of the weights are random."""
        total = sum(p.numel() for p in self.network.parameters())
        return f"random weights: {self.num_params} of {total}"


def functionalize(
    network: nn.Module, parameters: Parameters = "all"
) -> tuple[Apply, Params]:
    """Split a module into a pure function and a detached copy of its random weights."""
    net = FunctionalNet(network, parameters)
    return net.apply_network, {name: p.clone() for name, p in net.params.items()}


def jacobian(
    net: FunctionalNet,
    X: Tensor,
    params: Params | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Derivative of the outputs in the weights, :math:`J = \partial f / \partial w`.

    One backward pass per output and point, vectorised over points: time linear in the
    number of points. Memory is n m p numbers for the result and at most
    ``JACOBIAN_BYTES`` of workspace. Differentiable in ``X``.

    Args:
        net: The network.
        X: Inputs ``... x n x d``.
        params: Weights to differentiate in and their values; default all random ones.
        chunk_size: Points per vectorised pass; default as many as the budget allows.

    Returns:
        ``... x n x m x p``, the weights in the order of ``params``.
    """
    params = net.params if params is None else params
    rows = X.reshape(-1, X.shape[-1])
    sizes = [p.numel() for p in params.values()]
    if len(rows) == 0:
        return X.new_zeros(*X.shape[:-1], net.num_outputs, sum(sizes))
    if not net.vectorized:
        return _looped_jacobian(net, rows, params).reshape(
            *X.shape[:-1], -1, sum(sizes)
        )

    def one_point(values: Params, x: Tensor) -> Tensor:
        return net.apply_network(values, x[None])[0]

    if chunk_size is None:
        numbers = 3 * sum(sizes) + 2 * net.num_activations
        per_row = (net._num_outputs or 1) * numbers * rows.element_size()
        chunk_size = max(1, JACOBIAN_BYTES // per_row)
    blocks = vmap(
        jacrev(one_point),
        in_dims=(None, 0),
        chunk_size=chunk_size if chunk_size < len(rows) else None,
    )(params, rows)  # each rows x m x shape
    # Spelled out, because flatten(2) refuses the block of a scalar weight.
    flat = [b.reshape(*b.shape[:2], params[name].numel()) for name, b in blocks.items()]
    J = torch.cat(flat, dim=-1)
    return J.reshape(*X.shape[:-1], *J.shape[1:])


def jvp(
    net: FunctionalNet, X: Tensor, tangent: Tensor, params: Params | None = None
) -> Tensor:
    """Product ``J v``: ``... x n x d`` and ``p`` to ``... x n x m``."""
    params = net.params if params is None else params
    if not net.vectorized:
        return jacobian(net, X, params) @ tangent
    if net.forward_mode:
        _, product = torch.func.jvp(
            lambda values: net.apply_network(values, X),
            (params,),
            (net.unflatten(tangent),),
        )
        return product
    _, push = _transposed_pull(net, X, params)
    return push((net.unflatten(tangent),))[0]


def vjp(
    net: FunctionalNet, X: Tensor, cotangent: Tensor, params: Params | None = None
) -> Tensor:
    """Product ``J' u``: ``... x n x d`` and ``... x n x m`` to ``p``."""
    params = net.params if params is None else params
    if not net.vectorized:
        J = jacobian(net, X, params)
        return J.flatten(0, -2).mT @ cotangent.reshape(-1)
    _, pull = torch.func.vjp(lambda values: net.apply_network(values, X), params)
    return net.flatten(pull(cotangent)[0])


def linearize(
    net: FunctionalNet, X: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    r"""The tangent model :math:`f(x, w^*) + J(x)(w - w^*)` at fixed inputs.

    The forward pass is shared by all products, so that many tangents are cheap.

    Returns:
        The outputs ``... x n x m`` at the trained weights, and the map from a ``p``
        vector of weight changes to the change of the outputs.
    """
    if not net.vectorized:
        J = jacobian(net, X)
        return net(X), lambda tangent: J @ tangent
    # Reverse mode twice: torch.func.linearize traces, slowly and with warnings.
    outputs, push = _transposed_pull(net, X, net.params)
    return outputs, lambda tangent: push((net.unflatten(tangent),))[0]


def _transposed_pull(
    net: FunctionalNet, X: Tensor, params: Params
) -> tuple[Tensor, Callable]:
    """J v as the derivative of u -> v' J' u, which is linear in u."""
    value, pull = torch.func.vjp(lambda values: net.apply_network(values, X), params)
    _, push = torch.func.vjp(pull, torch.zeros_like(value))
    return value, push


def _random_names(network: nn.Module, parameters: Parameters) -> list[str]:
    every = [name for name, _ in network.named_parameters()]
    free = [name for name, p in network.named_parameters() if p.requires_grad]
    if parameters == "all":
        names = free
    elif parameters == "last_layer":
        owners = [name.rpartition(".")[0] for name in free]
        names = [name for name in free if name.rpartition(".")[0] == owners[-1]]
    elif callable(parameters):
        names = [name for name in free if parameters(name)]
    elif isinstance(parameters, str):
        raise ValueError(
            "parameters must be 'all', 'last_layer', a list of names or a predicate, "
            f"but is {parameters!r}. For one layer pass a list, [{parameters!r}]."
        )
    else:
        asked = list(parameters)
        unknown = [a for a in asked if not any(_belongs(n, a) for n in every)]
        if unknown:
            raise ValueError(
                f"parameters names {unknown}, which the network does not have. "
                f"It has {every}."
            )
        names = [name for name in free if any(_belongs(name, a) for a in asked)]
    if not names:
        raise ValueError(
            f"The network has no random weight left: {len(every)} parameters, "
            f"{len(free)} of them with requires_grad, none selected by "
            f"parameters={parameters!r}. Set requires_grad_(True) on those that should "
            "be random, or select others."
        )
    return names


def _belongs(name: str, asked: str) -> bool:
    return name == asked or name.startswith(asked + ".")


def copy_without_hooks(network: nn.Module) -> nn.Module:
    """Copy a module in eval mode without its owner's hooks; the module is not touched.

    A hook can hold or write anything of the caller's, also what no copy can be made of,
    so it stays behind. Those that torch itself installs to compute a weight
    (weight_norm, spectral_norm) are part of the function and come along.

    Args:
        network: The module.

    Returns:
        The copy.

    Raises:
        ValueError: If the module keeps tensors of a forward pass.
    """
    kept = {
        id(hooks): type(hooks)(
            (key, copy.deepcopy(hook))
            for key, hook in hooks.items()
            if type(hook).__module__.startswith("torch.nn.utils")
        )
        for module in network.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    }
    try:
        return copy.deepcopy(network, memo=kept).eval()
    except RuntimeError as error:
        raise ValueError(
            f"The network cannot be copied: {_first_line(error)} It keeps a tensor "
            "that a graph computed, in an attribute or by the old "
            "torch.nn.utils.weight_norm. Detach them, or use "
            "torch.nn.utils.parametrizations."
        ) from error


def _frozen_copy(network: nn.Module, freeze: bool, names: list[str]) -> nn.Module:
    with torch.inference_mode(False):
        own, random = copy_without_hooks(network), set(names)
    for name, p in own.named_parameters():
        p.requires_grad_(not freeze and name in random)
    return own


def _check_probe_shape(net: FunctionalNet, X: Tensor) -> None:
    if X.numel() == 0:
        raise ShapeError(
            f"The network is probed on the first points it sees, but X is empty (shape "
            f"{tuple(X.shape)}). Call it once with data."
        )
    shape = net.input_shape
    if shape is not None and math.prod(shape) != X.shape[-1]:
        raise ShapeError(
            f"input_shape {shape} has {math.prod(shape)} entries, but X has "
            f"{X.shape[-1]} columns (shape {tuple(X.shape)}). Flatten each input to a "
            "row."
        )


def _probe_values(net: FunctionalNet, rows: Tensor) -> int:
    before = {k: v.clone() for k, v in net.network.state_dict().items()}
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        batch = net.input_shape or rows.shape[-1:]
        try:
            outputs = net.network(rows.reshape(-1, *batch))
            again = net.network(rows.reshape(-1, *batch))
        except RuntimeError as error:
            error.add_note(
                f"The network fails on {len(rows)} inputs of shape {tuple(batch)}. "
                "Pass inputs of the width that it was trained on, and input_shape if "
                "they have to be unflattened."
            )
            raise
    after = net.network.state_dict()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    if changed:
        net.network.load_state_dict(before)
        raise ValueError(
            f"The network changes itself in forward: {changed} moved, in eval mode. "
            "A kernel must be a function of its inputs; remove the update from forward."
        )
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "The network must return one tensor, but returns "
            f"{type(outputs).__name__}. Wrap it in a module whose forward picks the "
            "tensor of outputs."
        )
    if outputs.dim() not in (1, 2) or len(outputs) != len(rows):
        raise ShapeError(
            f"The network must return ``n x m`` or ``n``, but {len(rows)} rows of "
            f"{tuple(batch)} gave {tuple(outputs.shape)}. Flatten the output, or pass "
            "input_shape if inputs have to be unflattened."
        )
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
    return 1 if outputs.dim() == 1 else outputs.shape[1]


def _count_activations(net: FunctionalNet, row: Tensor) -> int:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _probe_derivative(net: FunctionalNet, rows: Tensor) -> None:
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
            f"{_first_line(error)} Look for operations in place in its forward."
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
        warnings.warn(
            f"The output does not reach the weights {unused}; they do not contribute "
            "to the kernel. Exclude them with parameters=, or check forward.",
            stacklevel=4,
        )


def _probe_tracing(net: FunctionalNet, row: Tensor) -> None:
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
    warnings.warn(
        "torch.func cannot vectorise this network, so Jacobians are computed one "
        f"point at a time, which is slow: {problem} Avoid data-dependent control flow; "
        "give a custom autograd.Function setup_context and generate_vmap_rule.",
        stacklevel=4,
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
        return _first_line(error)
    for name, exact, got in zip(("values", "slopes"), plain, traced, strict=True):
        if exact is None:
            continue
        if got is None or _far(got.reshape(exact.shape), exact):
            return f"its {name} differ from those of plain autograd."
    return None


def _far(got: Tensor, exact: Tensor) -> bool:
    return bool((got - exact).abs().max() > 1e-2 * exact.abs().max())


def _has_any_slope(net: FunctionalNet, rows: Tensor, params: Params) -> bool:
    # Summed gradients can cancel (softmax outputs sum to a constant): look per output.
    J = _looped_jacobian(net, rows, params)
    return bool((J != 0).any())


def _looped_jacobian(net: FunctionalNet, rows: Tensor, params: Params) -> Tensor:
    """Plain autograd, one point and one output at a time, ``rows x m x p``."""
    create_graph = torch.is_grad_enabled() and (
        rows.requires_grad or any(p.requires_grad for p in params.values())
    )
    result = []
    with torch.enable_grad():
        leaves = {
            name: p if p.requires_grad else p.detach().requires_grad_()
            for name, p in params.items()
        }
        for x in rows:
            for output in net.apply_network(leaves, x[None])[0]:
                if not output.requires_grad:  # this point takes a constant branch
                    result.append(x.new_zeros(sum(p.numel() for p in leaves.values())))
                    continue
                grads = torch.autograd.grad(
                    output,
                    list(leaves.values()),
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                )
                result.append(
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).reshape(-1)
                            for g, p in zip(grads, leaves.values(), strict=True)
                        ]
                    )
                )
    return torch.stack(result).reshape(len(rows), -1, result[0].numel())
