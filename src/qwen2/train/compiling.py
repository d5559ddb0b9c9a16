"""torch.compile of what lies between the products of a layer: norms, rotations, silu(gate) · up.

Each is one loop over memory that the compiler makes of several, forward and backward. Products and
attention stay calls of their libraries, which a compiler does not make faster; so nothing that is
compiled knows of documents, whose lengths are others in every batch, of ranks, or of activations
that are computed again. All layers share the code: the number of tokens and of heads may change,
for which it is compiled once more, then for all. What ranks hand on while it is still on its way,
or in uneven shares, is computed as without: compiled code neither waits nor knows of the shares.

Deviation: a whole layer is not compiled. Around attention, the router and the experts it would fall
into pieces anyway, made anew for documents of other lengths and no faster (docs/LOG.md), and
`selective` (recompute.py) could no longer tell products from the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwen2.common.errors import UserError
from qwen2.model import kernels

COMPILED = ("norm", "rotate", "gate")
"""Operations of the table of kernels."""


@contextmanager
def compiled(wanted: bool, device: torch.device) -> Iterator[None]:
    """Where `wanted`, train with compiled code on `device` until this is left.

    Only while gradients are recorded: evaluation is as without.

    Raises:
        UserError: the compiler that torch.compile needs there is not installed.
    """
    if not wanted:
        yield
        return
    require_compiler(device)
    operations = [kernels.TABLE[name] for name in COMPILED]
    for operation in operations:
        operation.compiled = _compile(operation.plain[1].run)
    try:
        yield
    finally:
        for operation in operations:
            operation.compiled = None


def _compile(plain: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(plain)

    def run(*operands: Any) -> Any:
        kinds = {type(x) for x in operands if isinstance(x, Tensor)}
        return (fast if kinds <= {Tensor, nn.Parameter} else plain)(*operands)

    return run


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile can make code for `device`.

    Raises:
        UserError: it cannot; says what to install.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("compile: needs Triton on CUDA; pip install triton, or compile: false")
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError(
            "compile: needs a C++ compiler on the CPU; install g++, or compile: false"
        ) from None
