"""Every kernel compiles for every architecture, without warnings, spills or too many registers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import kernels, nvrtc
from lesionsynth.cuda import _source
from lesionsynth.cuda.records import BATCH, BLOB, ITEM, STATE

pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy, which is not installed")

MOST_REGISTERS = 128
"""Two blocks of 256 threads on a multiprocessor, so that one computes while another waits."""
MOST_SHARED = 48 * 1024
"""What a block gets without asking, on every architecture."""

CASES = [
    (program, image, architecture)
    for program in _source.PROGRAMS
    for image in _source.IMAGES
    for architecture in nvrtc.ARCHITECTURES
    # All types for one architecture, and all architectures for one type: the type changes two kernels.
    if image == "float32" or (architecture == 90 and program == "generator")
]


@pytest.mark.parametrize(("program", "image", "architecture"), CASES)
def test_compiles_within_its_limits(program, image, architecture) -> None:
    cubin, log = nvrtc.compile_program(_source.source(program, image), architecture)
    assert len(cubin) > 1000
    assert "warning" not in log.lower(), log
    found = nvrtc.usage_of(log)
    names = {usage.kernel for usage in found}
    assert names == set(_source.kernels_of(_source.source(program, image)))
    for usage in found:
        assert usage.spills == 0, usage
        assert usage.registers <= MOST_REGISTERS, usage
        assert usage.shared <= MOST_SHARED, usage
        assert usage.resident(architecture) >= (1 if architecture == 75 else 2), usage


def test_no_file_includes_another() -> None:
    """Users have no CUDA headers."""
    for program in _source.PROGRAMS:
        assert "#include" not in _source.source(program)


def test_records_are_laid_out_as_c_does() -> None:
    """The C compiler checks the size; here is the alignment that this rests on."""
    for kind in (BATCH, BLOB, ITEM, STATE):
        assert kind.isalignedstruct
        assert kind.itemsize % 8 == 0


def test_a_broken_program_is_refused() -> None:
    with pytest.raises(RuntimeError, match="identifier"):
        nvrtc.compile_program("KERNEL nonsense() {}", 90)


def test_residency() -> None:
    """Against the occupancy calculator: 32 registers fill 2048 threads; 46,736 bytes four times 228 KiB."""
    assert nvrtc.Usage("k", 32, 0, 0, 0).resident(90) == 8
    assert nvrtc.Usage("k", 128, 0, 0, 0).resident(90) == 2
    assert nvrtc.Usage("k", 64, 0, 0, 46736).resident(90) == 4
    assert nvrtc.Usage("k", 64, 0, 0, 46736).resident(75) == 1


@pytest.mark.slow
def test_the_table(tmp_path, capsys) -> None:
    kernels.main(["--output", str(tmp_path / "table.json")])
    assert "draw_blobs" in capsys.readouterr().out
    assert (tmp_path / "table.json").stat().st_size > 1000


def test_struct_text() -> None:
    kind = np.dtype([("a", np.int32, (2, 3)), ("b", np.float64)], align=True)
    assert "int a[2][3];" in _source.c_struct("Pair", kind)
    assert "sizeof(Pair) == 32" in _source.c_struct("Pair", kind)
