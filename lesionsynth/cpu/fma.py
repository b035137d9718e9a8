"""Fused multiply-add in Numba: one rounding, as CUDA's ``fmaf``, so both twins can give the same bits."""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.extending import intrinsic


def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c`` rounded once; the three operands have one floating-point type."""
    if not (isinstance(a, types.Float) and a == b == c):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, b, c), codegen


fma: Any = intrinsic(_fma)
