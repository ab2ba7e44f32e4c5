"""Tensors that a kernel depends on: noticed when written, saved and moved with it.

In: tensors, or a linear operator made of them. Out: a stamp that changes with them, and
a module that holds them as buffers. Next: ``tangent`` keeps Gram matrices as long as
the stamp of its weights stays.
"""

from __future__ import annotations

from collections.abc import Iterable

from linear_operator.operators import LinearOperator
from torch import Tensor, nn


class Stamp:
    """Tells tensors apart from the same ones after a write, without reading them.

    A write in place raises the version, ``p.data = other`` moves the address. The old
    memory is held, so that no other tensor gets its address.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.held = [tensor.detach() for tensor in tensors]
        self.state = [
            # Inference tensors count no versions.
            (t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version)
            for t in self.held
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stamp) and self.state == other.state

    __hash__ = None


class CovarianceBuffers(nn.Module):
    """The tensors of a covariance as buffers: saved, and moved with the kernel.

    A module of its own, since upstream indexes the buffers of a batch of kernels.
    """

    def __init__(self, covariance: LinearOperator) -> None:
        super().__init__()
        self._build = covariance.representation_tree()
        for i, tensor in enumerate(covariance.representation()):
            self.register_buffer(f"tensor_{i}", tensor)
        self._built: tuple | None = None

    def operator(self) -> LinearOperator:
        """The covariance; one as long as its values stay, for it keeps its root."""
        tensors = list(self._buffers.values())
        stamp = Stamp(tensors)
        if self._built is None or self._built[0] != stamp:
            self._built = stamp, self._build(*tensors)
        return self._built[1]

    def __getstate__(self) -> dict:
        """Copies and pickles leave the root behind, and rebuild upstream's tree."""
        covariance = self._build(*self._buffers.values())  # the tree cannot be pickled
        return {**self.__dict__, "_built": None, "_build": covariance}

    def __setstate__(self, state: dict) -> None:
        covariance = state["_build"]
        super().__setstate__({**state, "_build": covariance.representation_tree()})
