"""Arrays in, the same kind of arrays out: the public boundary, by DLPack and without copies.

Libraries are found in ``sys.modules`` through the type of the argument and are never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Restore = Callable[[Array], Any]

DLPACK_CPU = 1
DLPACK_CUDA = 2


class DLPackArray(Protocol):
    """An array of NumPy, CuPy, torch or another library that exchanges memory by DLPack."""

    @property
    def shape(self) -> Any:
        """Extents."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the memory over."""

    def __dlpack_device__(self) -> tuple[Any, Any]:
        """Tell the kind and the number of the device."""


def accept(x: Any, name: str) -> tuple[Array, Restore]:
    """Take a CPU array of any DLPack library as a NumPy view.

    Parameters
    ----------
    x : array
        NumPy array, or an object with ``__dlpack__`` in CPU memory (a torch tensor, say).
    name : str
        The caller's argument, for messages.

    Returns
    -------
    array : numpy.ndarray
        Shares memory with `x`.
    restore : callable
        Turns a NumPy array into an array of the library of `x`, without a copy.

    Raises
    ------
    TypeError
        `x` is not an array, or one of those that `check_dense` refuses.
    ValueError
        `x` is on another device, requires a gradient, or has a dtype NumPy lacks.
    """
    check_dense(x, name)
    if isinstance(x, np.ndarray):
        return x, _identity
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"{name} must be a NumPy array or a DLPack array such as a torch tensor, got {type(x).__name__}"
        )
    try:
        kind = int(x.__dlpack_device__()[0])
    except (BufferError, TypeError, ValueError) as error:  # torch's meta tensors have no memory to speak of
        device = getattr(x, "device", "unknown")
        raise ValueError(f"{name} must be in CPU or CUDA memory, got device {device}: {error}") from error
    if kind == DLPACK_CUDA:
        raise ValueError(f"{name} must be in CPU memory, as the other arrays are, got a CUDA array")
    if kind != DLPACK_CPU:
        raise ValueError(f"{name} must be in CPU memory, got DLPack device type {kind}")
    if getattr(x, "requires_grad", False):
        raise ValueError(f"{name} requires a gradient, which synthesis cannot give: pass {name}.detach()")
    try:
        view = np.from_dlpack(x)
    except (BufferError, TypeError, RuntimeError) as error:
        dtype = getattr(x, "dtype", "unknown")
        raise ValueError(f"{name} must have a dtype NumPy knows, got {dtype}: {error}") from error
    from_dlpack = getattr(sys.modules.get(library_of(x)), "from_dlpack", None)
    return view, _identity if from_dlpack is None else from_dlpack


def check_dense(x: Any, name: str) -> None:
    """Refuse arrays whose memory does not hold their values: masked, sparse, nested, lazy, or being traced.

    Raises
    ------
    TypeError
        `x` is such an array; the message names its kind.
    ValueError
        It is a lazy negation or conjugate.
    """
    if type(x) is np.ndarray:
        return
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked array: pass {name}.filled(...)")
    module = type(x).__module__
    if ".sparse" in module:
        raise TypeError(f"{name} must be a dense array, got {type(x).__name__}: pass {name}.toarray()")
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if module.startswith("torch.fx"):
        raise TypeError(_TRACED.format(name=name, kind="a Proxy of torch.fx"))
    if not isinstance(x, torch.Tensor):
        return
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if x.is_conj() or x.is_neg():
        lazy = "negation: pass {}.resolve_neg()" if x.is_neg() else "conjugate: pass the real part of {}"
        raise ValueError(f"{name} must hold its values, got a lazy {lazy.format(name)}")
    tracer = _tracer(torch, x)
    if tracer:
        raise TypeError(_TRACED.format(name=name, kind=tracer))


_TRACED = (
    "{name} must be a tensor that holds its values, got {kind}: synthesis cannot be traced, exported or "
    "mapped. Call it outside, or below torch.compile, which leaves it alone"
)


def _tracer(torch: Any, x: Any) -> str | None:
    """Name who only pretends that a tensor has values; names are torch's own, and a test watches them."""
    if torch.jit.is_tracing():
        return "one that torch.jit.trace records"
    if torch._is_functional_tensor(x) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "one of torch.func"
    modes = [type(x).__name__]
    if torch._C._len_torch_dispatch_stack():
        stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        modes += [type(mode).__name__ for mode in stack]
    return next((f"one under {kind}" for kind in modes if kind in _PRETENDING), None)


_PRETENDING = (
    "FakeTensor", "FunctionalTensor", "FakeTensorMode", "FunctionalTensorMode", "ProxyTorchDispatchMode",
)  # fmt: skip

Call = TypeVar("Call", bound=Callable[..., Any])


def untraced(function: Call) -> Call:
    """Mark a function as one that ``torch.compile`` calls as it is, between two graphs.

    torch is not imported: where its compiler is not loaded, nothing is being compiled.
    """
    disabled: list[Any] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(sys.modules["torch"].compiler.disable(function, reason=_UNTRACED))
        return disabled[0](*args, **kwargs)

    marks: Any = call
    marks._torchdynamo_disable, marks._torchdynamo_disable_msg = True, _UNTRACED  # as torch marks them
    return marks  # type: ignore[no-any-return]


_UNTRACED = "lesionsynth's kernels are no operations of torch, so fullgraph=True cannot hold them"


def device_kind(x: Any) -> int | None:
    """Return the DLPack device type of an array; None where it has none, or will not tell."""
    try:
        return int(x.__dlpack_device__()[0])
    except (AttributeError, AssertionError, BufferError, RuntimeError, TypeError, ValueError):
        return None  # `accept` says why


def library_of(x: Any) -> str:
    """Name the library of `x`: the first class of its MRO whose package can take DLPack objects."""
    for cls in type(x).__mro__:
        root = cls.__module__.partition(".")[0]
        if hasattr(sys.modules.get(root), "from_dlpack"):
            return root
    return "numpy"


def _identity(x: Array) -> Array:
    return x
