"""CUDA arrays as the kernels see them, without a GPU: torch tensors of the host that say they are on one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import lesionsynth as ls

cupy = pytest.importorskip("cupy")
torch = pytest.importorskip("torch")

from lesionsynth.cuda import arrays, ops  # noqa: E402


class OnGpu(torch.Tensor):
    """A tensor that says it is on CUDA device 0, and whose DLPack nobody may use: it synchronises streams."""

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        raise AssertionError("__dlpack__ was called")


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnGpu)


def host_view(array: arrays.DeviceArray) -> np.ndarray:
    """What is really at the addresses of a view, all of which its memory must hold."""
    view = array.view
    memory = view.data.mem
    reach = sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True)) + view.itemsize
    assert view.size == 0 or view.data.ptr + reach == memory.ptr + memory.size
    interface = {"version": 3, "data": (view.data.ptr, True), "shape": view.shape, "strides": view.strides}

    class Holder:
        __array_interface__ = interface | {"typestr": view.dtype.str}

    return np.asarray(Holder())


@given(
    data=st.data(),
    kind=st.sampled_from([*arrays.NUMBERS, "bfloat16"]),
    shape=st.lists(st.integers(1, 5), min_size=3, max_size=4),
)
def test_any_tensor_is_seen_where_it_is(data, kind, shape) -> None:
    """Views of every kind: permuted, cropped, strided, expanded."""
    dtype = getattr(torch, kind)
    tensor = (torch.arange(int(np.prod(shape))) % 7).reshape(shape).to(dtype)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    for axis in range(tensor.ndim):
        first = data.draw(st.integers(0, tensor.shape[axis] - 1))
        step = data.draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * axis + (slice(first, None, step),)]
    if data.draw(st.booleans()):
        tensor = tensor[:1].expand(3, *tensor.shape[1:])
    found = arrays.accept(on_gpu(tensor), "x", bfloat16=True)
    assert (found.kind, found.library, found.device) == (kind, "torch", 0)
    assert found.view.data.ptr == tensor.data_ptr()
    expected = (tensor.view(torch.int16) if kind == "bfloat16" else tensor).numpy()
    assert_array_equal(host_view(found), expected)
    if tensor.ndim == 4:
        assert found.batch_view().strides == tensor.stride()


def test_the_view_keeps_the_tensor() -> None:
    tensor = on_gpu(torch.ones(2, 3, 4))
    assert arrays.accept(tensor, "x").view.data.mem._owner is tensor


def test_tensors_that_are_not_what_they_seem() -> None:
    negation = torch.ones(2, 2, 2, dtype=torch.complex64).conj().imag
    assert negation.is_neg()
    for tensor, error, message in (
        (torch.ones(2, 2, 2, requires_grad=True), ValueError, r"x requires a gradient.*x\.detach"),
        (negation, ValueError, r"x must hold its values.*resolve_neg"),
        (
            torch.ones(2, 2, 2, dtype=torch.complex64),
            TypeError,
            "bool, integer or float, got torch.complex64",
        ),
        (torch.ones(2, 2, 2).to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
    ):
        with pytest.raises(error, match=message):
            arrays.accept(on_gpu(tensor), "x")

    class Sparse(OnGpu):
        layout = torch.sparse_coo

    with pytest.raises(TypeError, match=r"x must be a dense tensor, got layout torch\.sparse_coo"):
        arrays.accept(torch.ones(2, 2, 2).as_subclass(Sparse), "x")
    with pytest.raises(TypeError, match="x must be on a CUDA device"):
        arrays.accept(torch.ones(2, 2, 2), "x")


CALLS = {
    "window_hu": ls.window_hu,
    "gaussian_filter": lambda x: ls.ops.gaussian_filter(x, 1.0),
    "uniform_filter": lambda x: ls.ops.uniform_filter(x, 3),
    "label": ls.ops.label,
    "grow": lambda x: ls.ops.grow(x, x),
    "grow mask": lambda x: ls.ops.grow(x.view(torch.uint8)[..., ::2], x),
    "edges": lambda x: ls.remove_erroneous_edges(x, x > 0),
    "edges mask": lambda x: ls.remove_erroneous_edges(x.float(), x),
    "philox_uniform": lambda x: ls.ops.philox_uniform((3, 4, 4), 0, out=x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_bfloat16_is_refused_as_on_the_cpu(call, monkeypatch) -> None:
    """Its view holds bits: taken for int16, they would be Hounsfield units from nowhere."""
    for module in ("cuda.backend", "cuda.ops", "lungs", "window"):
        monkeypatch.setattr(f"lesionsynth.{module}.check_cupy", lambda reason: None)
    half = torch.ones(3, 4, 4, dtype=torch.bfloat16)
    messages = []
    for tensor in (half, on_gpu(half)):
        with pytest.raises(ValueError, match=r"must have a dtype NumPy knows, got torch\.bfloat16") as told:
            call(tensor)
        messages.append(str(told.value).partition(":")[0])
    assert messages[0] == messages[1]


def test_noise_is_drawn_into_a_tensor(monkeypatch) -> None:
    """On the tensor's own stream, so that what torch launches next sees it; nothing else is allocated."""
    seen = {}

    class Stream:
        def __init__(self, array) -> None:
            seen["stream of"] = array

        def __enter__(self) -> None:
            seen["inside"] = True

        def __exit__(self, *_) -> None:
            seen["inside"] = False

    def fill(device, shape, words, offset, pointer) -> None:
        seen["fill"] = seen["inside"], shape, words, offset, pointer

    monkeypatch.setattr("lesionsynth.cuda.backend.check_cupy", lambda reason: None)
    monkeypatch.setattr(ops, "stream_of", Stream)
    monkeypatch.setattr(ops, "_device", lambda number: None)
    monkeypatch.setattr(ops.filters, "fill_uniform", fill)
    out = on_gpu(torch.empty(2, 3, 4))
    assert ls.ops.philox_uniform((2, 3, 4), 5, stream=6, sample=7, offset=(1, 2, 3), out=out) is out
    assert seen["stream of"] is out
    assert seen["fill"] == (True, (2, 3, 4), (5, 6, 7, 0), (1, 2, 3), out.data_ptr())
    with pytest.raises(ValueError, match=r"out must have the shape asked for, \(2, 3, 5\), got \(2, 3, 4\)"):
        ls.ops.philox_uniform((2, 3, 5), 5, out=out)


# --- memory ---


class OutOfMemoryError(RuntimeError):
    """By the name that CuPy and torch give theirs."""


class StatusError(RuntimeError):
    """As the runtime's and the driver's errors are."""

    def __init__(self, status: int) -> None:
        super().__init__("out of memory" if status == 2 else "illegal address")
        self.status = status


@pytest.mark.parametrize(
    "error",
    [OutOfMemoryError("tried to allocate"), torch.OutOfMemoryError("tried"), StatusError(2)],
    ids=["cupy", "torch", "page-locked"],
)
def test_whoever_lacks_memory_the_remedy_is_told(error) -> None:
    with pytest.raises(MemoryError) as told, arrays.remedied(1, (8, 32, 512, 512)):
        raise error
    message = str(told.value)
    for part in ("(8, 32, 512, 512)", "cuda:1", "lesionsynth.release_memory()", "torch.cuda.empty_cache()"):
        assert part in message
    assert message.endswith(str(error))
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("rank"), StatusError(700)])
def test_other_errors_stay_what_they_are(error) -> None:
    with pytest.raises(type(error)) as told, arrays.remedied(0, (1,)):
        raise error
    assert told.value is error


def test_cupys_error_has_that_name() -> None:
    assert cupy.cuda.memory.OutOfMemoryError.__name__ == torch.OutOfMemoryError.__name__ == "OutOfMemoryError"
    assert cupy.cuda.runtime.CUDARuntimeError(2).status == 2  # the driver's needs a driver
