"""Every kernel compiles for every architecture, without warnings, spills or too many registers."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest

from benchmarks import kernels, nvrtc
from lesionsynth import _cache
from lesionsynth.cuda import compiling, programs
from lesionsynth.cuda.records import BATCH, BLOB, ITEM, STATE
from lesionsynth.cuda.render import BLOCKS_OF_COPY

pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy, which is not installed")

MOST_REGISTERS = 128
"""Two blocks of 256 threads on a multiprocessor, so that one computes while another waits."""
MOST_SHARED = 48 * 1024
"""What a block gets without asking, on every architecture."""

CASES = [
    (program, image, architecture)
    for program in programs.PROGRAMS
    for image in programs.IMAGES
    for architecture in nvrtc.ARCHITECTURES
    # All types for one architecture, and all architectures for one type: the type changes two kernels.
    if image == "float32" or (architecture == 90 and program == "generator")
]


@pytest.mark.parametrize(("program", "image", "architecture"), CASES)
def test_compiles_within_its_limits(program, image, architecture) -> None:
    found, log = nvrtc.resources(programs.source(program, image), architecture)
    assert "warning" not in log.lower(), log
    names = {usage.kernel for usage in found}
    assert names == set(programs.kernels_of(programs.source(program, image)))
    for usage in found:
        assert usage.spills == 0, usage
        assert usage.registers <= MOST_REGISTERS, usage
        assert usage.shared <= MOST_SHARED, usage
        assert usage.resident(architecture) >= (1 if architecture == 75 else 2), usage
    if program == "generator":
        _check_neighbours({usage.kernel: usage for usage in found}, image)


def _check_neighbours(found, image) -> None:
    """What runs beside the copy finds room there: `render.BLOCKS_OF_COPY` of it and a block of any other."""
    copy, inject = found["copy_pair"], found["inject"]
    assert copy.stack == copy.shared == 0, copy
    assert copy.registers <= (80 if image == "float64" else 64), copy
    assert inject.registers <= 64, inject
    assert inject.stack == inject.shared == 0, inject
    soft = found["inject_soft"]
    assert soft.registers <= 80, soft
    assert soft.stack == soft.shared == 0, soft
    assert found["edge_in_plane"].registers <= 64, found["edge_in_plane"]
    assert found["read_mask"].registers <= 64, found["read_mask"]
    if image != "float64":
        for usage in found.values():
            taken = BLOCKS_OF_COPY * taken_registers(copy) + taken_registers(usage)
            assert taken <= nvrtc.REGISTERS, usage


def taken_registers(usage) -> int:
    """Of a multiprocessor by a block: warps take them in units of 256."""
    return -(-usage.registers * 32 // 256) * 256 * (programs.THREADS // 32)


def test_no_file_includes_another() -> None:
    """Users have no CUDA headers."""
    for program in programs.PROGRAMS:
        assert "#include" not in programs.source(program)


def test_records_are_laid_out_as_c_does() -> None:
    """The C compiler checks the size; here is the alignment that this rests on."""
    for kind in (BATCH, BLOB, ITEM, STATE):
        assert kind.isalignedstruct
        assert kind.itemsize % 8 == 0


def test_a_broken_program_is_refused() -> None:
    with pytest.raises(RuntimeError, match="identifier"):
        compiling.compile_program("KERNEL nonsense() {}", "sm_90")


SPILLS = r"""
__device__ __noinline__ float deep(const float* x, int n) {
    float a[200];
#pragma unroll
    for (int i = 0; i < 200; i++) a[i] = x[i * n];
    __syncthreads();
    float s = 0.0f;
#pragma unroll
    for (int i = 0; i < 200; i++) s = s * a[i] + a[i * 7 % 200];
    return s;
}
extern "C" __global__ void __launch_bounds__(1024) outer(float* x, int n) {
    __shared__ float s[100];
    s[threadIdx.x % 100] = x[n];
    for (int k = 0; k < n; k++) x[k] = deep(x + k, n) + s[k];
}
extern "C" __global__ void small(float* x) { x[threadIdx.x] = 1.0f; }
"""


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
def test_usage_counts_the_functions_that_a_kernel_calls(architecture) -> None:
    found = {u.kernel: u for u in nvrtc.resources(SPILLS, architecture)[0]}
    assert found.keys() == {"outer", "small"}
    assert found["outer"].registers == 64
    assert found["outer"].spills > 500
    assert found["outer"].stack > 500
    assert found["outer"].shared == 400
    assert found["small"].spills == found["small"].stack == found["small"].shared == 0


def test_residency() -> None:
    """Against the occupancy calculator: 32 registers fill 2048 threads; 46,736 bytes four times 228 KiB."""
    assert nvrtc.Usage("k", 32, 0, 0, 0).resident(90) == 8
    assert nvrtc.Usage("k", 128, 0, 0, 0).resident(90) == 2
    assert nvrtc.Usage("k", 64, 0, 0, 46736).resident(90) == 4
    assert nvrtc.Usage("k", 64, 0, 0, 46736).resident(75) == 1


@pytest.mark.slow
def test_the_table(tmp_path, capsys) -> None:
    kernels.main(["--output", str(tmp_path / "new" / "table.json")])
    assert "draw_blobs" in capsys.readouterr().out
    record = json.loads((tmp_path / "new" / "table.json").read_text())
    assert record.keys() == {
        "format",
        "version",
        "nvrtc",
        "options",
        "threads",
        "image",
        "machine",
        "programs",
    }
    for program in programs.PROGRAMS:
        names = programs.kernels_of(programs.source(program))
        for architecture in nvrtc.ARCHITECTURES:
            rows = record["programs"][program][f"sm_{architecture}"]
            assert {row["kernel"] for row in rows} == set(names)
            assert all(row["resident_blocks"] >= 1 and row["registers"] > 0 for row in rows)


def test_struct_text() -> None:
    kind = np.dtype([("a", np.int32, (2, 3)), ("b", np.float64)], align=True)
    assert "int a[2][3];" in programs.c_struct("Pair", kind)
    assert "sizeof(Pair) == 32" in programs.c_struct("Pair", kind)


# --- the cache ---


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A program of one kernel, and a cache of its own."""
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "cache"))
    text = 'extern "C" __global__ void scale(float* x) { x[0] = x[0] * x[1] + x[2]; }'
    monkeypatch.setattr(compiling, "source", lambda program, image: f"// {program} {image}\n{text}")
    return tmp_path / "cache"


def files(folder) -> list:
    return sorted(path for path in folder.iterdir() if path.is_file())


def headers_end(code: bytes) -> int:
    """Where the last header or section of a 64-bit ELF file ends, by the standard."""
    assert code[:6] == b"\x7fELF\x02\x01"
    names = "<16sHHIQQQIHHHHHH"
    *_, program_at, section_at, _, _, program_size, programs, section_size, sections, _ = struct.unpack_from(
        names, code
    )
    ends = [program_at + program_size * programs, section_at + section_size * sections]
    for k in range(sections):
        fields = struct.unpack_from("<IIQQQQ", code, section_at + section_size * k)
        kind, offset, size = fields[1], fields[4], fields[5]
        ends.append(0 if kind == 8 else offset + size)  # SHT_NOBITS takes no room
    return max(ends)


def test_compiled_once_and_found_again(tiny, monkeypatch) -> None:
    first = compiling.compiled("ops", "float32", 90)
    assert first[:4] == b"\x7fELF"
    (file,) = files(tiny)
    assert file.read_bytes() == first
    assert file.stat().st_mode & 0o777 == 0o600
    assert tiny.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compiling, "compile_program", lambda *_: pytest.fail("compiled again"))
    assert compiling.compiled("ops", "float32", 90) == first


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
def test_the_headers_of_machine_code_fit_its_length(architecture, tiny) -> None:
    """CuPy takes the last byte off; drivers refuse such a file."""
    code = compiling.compiled("ops", "float32", architecture)
    assert len(code) == headers_end(code)
    assert files(tiny)[0].stat().st_size == len(code)


def test_whole_generators() -> None:
    code, _ = compiling.compile_program(programs.source("generator"), "sm_90")
    assert len(code) == headers_end(code)
    assert compiling.whole(code) == code, "a CuPy that leaves the byte where it is"
    assert compiling.whole(code[:-1]) == code
    with pytest.raises(RuntimeError, match=r"machine code of \d+ bytes where its headers tell of"):
        compiling.whole(code[:-2])
    with pytest.raises(RuntimeError, match="no machine code"):
        compiling.whole(b"// PTX")


def test_another_source_architecture_type_or_format_is_another_file(tiny, monkeypatch) -> None:
    for image, architecture in (("float32", 90), ("float16", 90), ("float32", 80)):
        compiling.compiled("ops", image, architecture)
    assert len(files(tiny)) == 3
    monkeypatch.setattr(compiling, "OPTIONS", (*compiling.OPTIONS, "--fmad=true"))
    compiling.compiled("ops", "float32", 90)
    assert len(files(tiny)) == 4
    monkeypatch.setattr(compiling, "FORMAT", "another")
    compiling.compiled("ops", "float32", 90)
    assert len(files(tiny)) == 5


def test_devices_that_nvrtc_does_not_know(tiny) -> None:
    """A newer one gets intermediate code, which its driver compiles; an older one a word of advice."""
    assert b".target sm_" in compiling.compiled("ops", "float32", 999)
    assert [file.suffix for file in files(tiny)] == [".ptx"]
    with pytest.raises(RuntimeError, match=r"compute capability 5\.0.*lesionsynth\[cuda12\]"):
        compiling.compiled("ops", "float32", 50)


def test_a_damaged_file_is_compiled_anew(tiny) -> None:
    """Cut short by a full disk, or empty."""
    first = compiling.compiled("ops", "float32", 90)
    (file,) = files(tiny)
    for damaged in (first[:-100], b"", b"not machine code"):
        file.write_bytes(damaged)
        assert compiling.compiled("ops", "float32", 90) == first
        assert file.read_bytes() == first


# --- whose code it is ---


def spoiled(tiny) -> bytes:
    """Compile, and put another's code into the file: sound machine code of another kernel."""
    right = compiling.compiled("ops", "float32", 90)
    _cache._told.cache_clear()
    (file,) = files(tiny)
    wrong, _ = compiling.compile_program('extern "C" __global__ void evil() {}', "sm_90")
    file.write_bytes(wrong)
    return right


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are POSIX's")
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_not_used(mode, tiny) -> None:
    right = spoiled(tiny)
    tiny.chmod(mode)
    with pytest.warns(
        RuntimeWarning, match=r"compiled in every process: .*others may write to it; chmod go-w"
    ):
        assert compiling.compiled("ops", "float32", 90) == right
    assert compiling.compiled("ops", "float32", 90) == right, "told once: a second warning would be an error"
    assert len(files(tiny)) == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are POSIX's")
def test_a_folder_or_file_of_another_user_is_not_used(tiny, monkeypatch) -> None:
    right = spoiled(tiny)
    (file,) = files(tiny)
    another = os.getuid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: another)
        with pytest.warns(RuntimeWarning, match=rf"belongs to user \d+, not to {another}"):
            assert compiling.compiled("ops", "float32", 90) == right
    file.chmod(0o666)
    assert compiling.compiled("ops", "float32", 90) == right
    assert file.read_bytes() == right, "replaced: the folder is the user's"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_cache_that_cannot_be_written(tiny, monkeypatch, tmp_path) -> None:
    _cache._told.cache_clear()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match=r"(?s)file.cache is not used.*LESIONSYNTH_CACHE_DIR"):
        assert compiling.compiled("ops", "float32", 90)[:4] == b"\x7fELF"


def test_denormals_and_products_are_kept(tiny) -> None:
    """No flushing to zero, no contraction: the CPU does neither."""
    text = compiling.compiled("ops", "float32", 999).decode()
    assert "mul.rn.f32" in text
    assert "add.rn.f32" in text
    assert ".ftz" not in text
    assert "fma" not in text
