"""Where nothing is writable, or the cache is in no state to be used: kernels work, and it is said once."""

from __future__ import annotations

import ast
import errno
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numba
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesionsynth import _cache
from tests.conftest import REPOSITORY
from tests.hostile.tally import trial


def twice_and_one(x):
    return 2 * x + 1


def fresh():
    """The same kernel as a new process would have it, nothing compiled yet."""
    return _cache.compiled(twice_and_one)


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    """As in a new process whose environment names no folder."""
    _cache._told.cache_clear()
    for name in ("LESIONSYNTH_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    yield
    _cache._told.cache_clear()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def compiled_anew() -> bool:
    """Call a fresh kernel; tells whether it was compiled. The result is right in any case."""
    kernel = fresh()
    assert kernel(20) == 41
    return sum(kernel.stats.cache_misses.values()) == 1


@contextmanager
def told(times: int):
    """Fail unless so many warnings, of ours, came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in caught]
    assert len(texts) == times, texts
    for text in texts:
        assert "compiled in every process" in text
        assert "LESIONSYNTH_CACHE_DIR" in text


# --- folders that cannot be had ---


def below_a_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "file" / "a" / "b"))


def a_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "file"))


def a_loop(tmp_path, monkeypatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "loop" / "cache"))


def dangling(tmp_path, monkeypatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "link"))


def nobody_home(tmp_path, monkeypatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


def numba_below_a_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))


def everybodys(tmp_path, monkeypatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "cache"))


def somebodys(tmp_path, monkeypatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "cache"))
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)


FOLDERS = {
    "a file": a_file,
    "below a file": below_a_file,
    "a loop": a_loop,
    "a dangling link": dangling,
    "/proc": lambda _, patch: patch.setenv("LESIONSYNTH_CACHE_DIR", "/proc/lesionsynth"),
    "/dev/null": lambda _, patch: patch.setenv("LESIONSYNTH_CACHE_DIR", "/dev/null"),
    "too long": lambda _, patch: patch.setenv("LESIONSYNTH_CACHE_DIR", "/tmp/" + "x" * 300),
    "no home": nobody_home,
    "HOME does not exist": lambda tmp_path, patch: patch.setenv("HOME", str(tmp_path / "nowhere" / "home")),
    "NUMBA_CACHE_DIR below a file": numba_below_a_file,
    "others may write": everybodys,
    "another user's": somebodys,
}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX's folders")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_used(name, tmp_path, monkeypatch) -> None:
    """Every kernel is compiled and right; one warning says why, for all of them."""
    FOLDERS[name](tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with trial("unwritable"):
        with told(1):
            assert compiled_anew()
            assert compiled_anew()
        assert sorted(tmp_path.rglob("*")) == before


ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE]


@pytest.mark.parametrize("step", ["mkdir", "stat", "open", "mkstemp", "fdopen", "write", "replace"])
@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_a_step_that_fails(step, code, place, monkeypatch) -> None:
    """Whichever call of the system fails, and wherever: nothing half-written stays."""
    error = OSError(code, os.strerror(code))

    def fail(*_args, **_options):
        raise error

    class Full:
        """A file on a full disk."""

        def __init__(self, handle, _mode) -> None:
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *_):
            os.close(self.handle)

        write = staticmethod(fail)

    where = {
        "mkdir": (Path, "mkdir"), "stat": (Path, "stat"), "open": (os, "open"), "replace": (os, "replace"),
        "mkstemp": (_cache.tempfile, "mkstemp"), "fdopen": (os, "fdopen"), "write": (os, "fdopen"),
    }  # fmt: skip
    with trial("unwritable"), told(1):
        with monkeypatch.context() as patch:
            patch.setattr(*where[step], Full if step == "write" else fail)
            assert compiled_anew()
            assert compiled_anew()
        assert [f for f in files(place) if f.suffix != ".nbc"] == []
        compiled_anew()
        assert not compiled_anew(), "the cause is gone, and so is the effect"


def test_a_folder_that_disappears(place) -> None:
    """Between two kernels, and between looking and keeping."""
    with trial("unwritable"), told(0):
        assert compiled_anew()
        shutil.rmtree(place)
        assert compiled_anew()
        assert not compiled_anew()


@pytest.mark.parametrize(
    "name", ["a b", "ü ß 肺", "quote'\"$x", "-n", b"not \xff utf-8", "new\nline", "%s {x}"]
)
def test_names_of_folders(name, tmp_path, monkeypatch) -> None:
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name))))
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(folder))
    with trial("unwritable"), told(0):
        assert compiled_anew()
        assert not compiled_anew()
        assert len(files(folder)) == 1


def test_who_names_the_folder(tmp_path, monkeypatch) -> None:
    """NUMBA_CACHE_DIR, LESIONSYNTH_CACHE_DIR, XDG_CACHE_HOME where it is absolute, HOME."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    expected = [home / ".cache" / "lesionsynth"]
    for name, value, folder in (
        ("XDG_CACHE_HOME", "relative", None),
        ("XDG_CACHE_HOME", str(tmp_path / "xdg"), tmp_path / "xdg" / "lesionsynth"),
        ("LESIONSYNTH_CACHE_DIR", str(tmp_path / "own"), tmp_path / "own"),
    ):
        with trial("unwritable"):
            assert _cache.cache_folder() == _cache.kernel_folder() == expected[-1]
            monkeypatch.setenv(name, value)
            expected.append(folder or expected[-1])
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    assert _cache.cache_folder() == tmp_path / "own"
    assert _cache.kernel_folder() == tmp_path / "numba" / "lesionsynth"


# --- files that are damaged ---


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, bytes]:
    """A kernel's file, and what it holds."""
    folder = tmp_path_factory.mktemp("sound") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESIONSYNTH_CACHE_DIR", str(folder))
        patch.setattr(numba.config, "CACHE_DIR", "")
        assert compiled_anew()
    (file,) = files(folder)
    return file, file.read_bytes()


@given(st.data())
def test_a_damaged_file(sound, data) -> None:
    """Cut, emptied, overwritten, a bit flipped anywhere: compiled anew and replaced, without a word."""
    file, right = sound
    place = data.draw(st.integers(0, len(right) - 1))
    damage = data.draw(st.sampled_from(["cut", "bit", "zeros", "garbage", "longer"]))
    wrong = {
        "cut": right[:place],
        "bit": right[:place] + bytes([right[place] ^ (1 << place % 8)]) + right[place + 1 :],
        "zeros": right[:place] + bytes(len(right) - place) if any(right[place:]) else b"",
        "garbage": data.draw(st.binary(max_size=100)),
        "longer": right + b"x",
    }[damage]
    with pytest.MonkeyPatch.context() as patch, trial("unwritable"), told(0):
        patch.setenv("LESIONSYNTH_CACHE_DIR", str(file.parent))
        patch.setattr(numba.config, "CACHE_DIR", "")
        file.write_bytes(wrong)
        assert compiled_anew()
        assert not compiled_anew()
        assert files(file.parent) == [file]


def test_a_file_that_others_may_write_is_replaced(sound, monkeypatch) -> None:
    file, right = sound
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(file.parent))
    with trial("unwritable"), told(0):
        file.write_bytes(right)
        file.chmod(0o666)
        assert compiled_anew()
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_where_the_file_belongs(sound, monkeypatch) -> None:
    file, _ = sound
    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(file.parent))
    file.unlink()
    file.mkdir()
    try:
        with trial("unwritable"), told(1):
            assert compiled_anew()
            assert files(file.parent) == [file]
    finally:
        file.rmdir()


def a_sparse_file(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, 2**40)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX's files")
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, a_sparse_file, lambda path: path.symlink_to("/dev/zero")],
    ids=["pipe", "sparse", "zero"],
)
def test_what_is_no_kernels_file_is_replaced(make, place) -> None:
    """Nothing is waited for, nor is memory taken for it."""
    compiled_anew()
    (file,) = files(place)
    with trial("unwritable"), told(0):
        file.unlink()
        make(file)
        assert compiled_anew()
        assert not compiled_anew()
        assert file.stat().st_size < _cache.LONGEST


def test_another_kernels_file_is_not_loaded(place) -> None:
    """Copied onto the name of this one."""
    compiled_anew()
    (file,) = files(place)
    with trial("unwritable"):
        other = place / ("x" + file.name)
        data = file.read_bytes()[: -_cache.DIGEST]
        other.write_bytes(data + _cache._digest(other.name, data))
        file.write_bytes(other.read_bytes())
        assert compiled_anew()


# --- what code depends on ---


@pytest.mark.parametrize(
    "what", ["a module", "numba", "llvmlite", "python", "OPT", "BOUNDSCHECK", "processor"]
)
def test_other_code_has_another_name(what, place, monkeypatch) -> None:
    """Of another checkout, version or processor, or under another switch of Numba: both stay."""
    from numba.core import codegen

    changes = {
        "a module": (_cache, "sources_of", lambda module: b"other"),
        "numba": (numba, "__version__", "0"),
        "llvmlite": (_cache.llvmlite, "__version__", "0"),
        "python": (sys, "version", "3"),
        "OPT": (numba.config, "OPT", 1),
        "BOUNDSCHECK": (numba.config, "BOUNDSCHECK", 1),
        "processor": (codegen.JITCPUCodegen, "magic_tuple", lambda self: ("other",)),
    }
    assert compiled_anew()
    with trial("unwritable"):
        with monkeypatch.context() as patch:
            patch.setattr(*changes[what])
            assert compiled_anew()
            assert not compiled_anew()
        assert not compiled_anew()
        assert len(files(place)) == 2


def test_kernels_are_made_of_files_that_are_looked_at() -> None:
    """A kernel takes code and constants from its own module and from lesionsynth.cpu, from nowhere else."""
    for path in sorted((REPOSITORY / "lesionsynth").rglob("*.py")):
        tree = ast.parse(path.read_text())
        used = {
            name.id
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            and any(
                ast.unparse(d) in ("kernel", "inner", "maker", "compiled") for d in function.decorator_list
            )
            for statement in function.body
            for name in ast.walk(statement)
            if isinstance(name, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lesionsynth"):
                from_kernels = node.module == "lesionsynth.cpu" or node.module.startswith("lesionsynth.cpu.")
                assert from_kernels or not used & {alias.name for alias in node.names}, path


def test_every_kernel_is_kept_by_the_rule() -> None:
    """None has Numba's own cache, which fails at import where nothing is writable."""
    texts = {p: p.read_text() for p in (REPOSITORY / "lesionsynth").rglob("*.py")}
    assert [p for p, text in texts.items() if "cache=True" in text] == []


# --- whole processes ---

LABEL = """
import warnings; warnings.simplefilter("always")
import numpy as np, lesionsynth as ls
labels, n = ls.ops.label(np.eye(5, dtype=bool)[None])
print("labels", n, int(labels.sum()))
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "LESIONSYNTH_", "XDG_"))}
    return subprocess.run(
        command, env=clean | environment, cwd="/", capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_a_read_only_machine(tmp_path) -> None:
    """Package, home and /tmp read-only, as in a container: import, phantom, and operations work."""
    script = f"""
set -e
for place in "$1" "$2" /tmp; do mount --bind "$place" "$place"; mount -o remount,ro,bind "$place"; done
! touch "$1/x" "$2/x" /tmp/x 2>/dev/null
exec "{sys.executable}" -B -c "$3"
"""
    home = tmp_path / "home"
    home.mkdir()
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(REPOSITORY), str(home)]
    if run([*command, "print('mounted')"]).stdout != "mounted\n":
        pytest.skip("no user namespaces here")
    with trial("unwritable"):
        done = run([*command, LABEL], HOME=str(home), PYTHONPATH=str(REPOSITORY))
        assert done.stdout == "labels 5 15\n", done.stderr
        assert done.stderr.count("RuntimeWarning") == 1
        assert "Read-only file system" in done.stderr
        assert "LESIONSYNTH_CACHE_DIR" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_a_full_disk(tmp_path) -> None:
    """A file system of two pages."""
    script = f"""
set -e
mount -t tmpfs -o size=8k none "$1"
exec "{sys.executable}" -B -c "$2
import os; print(sorted(os.listdir('$1/cache')))"
"""
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path)]
    (tmp_path / "cache").mkdir()
    if run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)]).returncode:
        pytest.skip("no user namespaces here")
    with trial("unwritable"):
        environment = {"LESIONSYNTH_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
        done = run([*command, LABEL], **environment)
        assert done.stdout.startswith("labels 5 15\n"), done.stderr
        assert "No space left on device" in done.stderr
        assert done.stderr.count("RuntimeWarning") == 1


@pytest.mark.slow
def test_processes_that_compile_at_once(tmp_path) -> None:
    """Each is right, and nothing but whole files is left."""
    environment = {"LESIONSYNTH_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", LABEL.replace("import warnings; ", "#")],
            env=os.environ | environment | {"NUMBA_CACHE_DIR": ""},
            cwd="/",
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    with trial("unwritable"):
        assert [process.communicate(timeout=500)[0] for process in started] == ["labels 5 15\n"] * 4
        assert {file.suffix for file in files(tmp_path / "cache")} == {".nbc"}


@pytest.mark.slow
def test_an_archive(tmp_path) -> None:
    """Imported from a ZIP file, kernels are kept as elsewhere; those of another archive are not used."""
    for number, text in enumerate(("", "# changed\n")):
        package = tmp_path / f"package{number}"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / "lesionsynth", package / "lesionsynth", ignore=ignored)
        module = package / "lesionsynth" / "cpu" / "engine" / "bits.py"
        module.write_text(module.read_text() + text)
        shutil.make_archive(str(package), "zip", package)
        shutil.rmtree(package)
    cache, counts = tmp_path / "cache", []
    for name in ("package0", "package0", "package1"):
        with trial("unwritable"):
            command = [sys.executable, "-c", LABEL + "print(ls.__file__)"]
            environment = {"LESIONSYNTH_CACHE_DIR": str(cache), "PYTHONPATH": str(tmp_path / f"{name}.zip")}
            done = run(command, **environment)
            assert done.stdout.startswith("labels 5 15\n"), done.stderr
            assert f"{name}.zip" in done.stdout
            assert done.stderr == ""
            counts.append(len(files(cache)))
    assert counts[0] == counts[1]
    assert counts[2] == 2 * counts[0]


@pytest.mark.parametrize(
    "call",
    [
        "ls.ops.label(np.eye(3)[None])",
        "ls.LesionSynthesizer(ls.LesionConfig()).sample(index=0)",
        "ls.phantom.chest_ct()",
    ],
)
def test_without_a_compiler(call) -> None:
    """Python cannot run the kernels' instructions: the first call says what to do; importing works."""
    with trial("unwritable"):
        code = f"import numpy as np, lesionsynth as ls\nprint('imported')\n{call}"
        done = run([sys.executable, "-c", code], NUMBA_DISABLE_JIT="1", PYTHONPATH=str(REPOSITORY))
        assert done.stdout == "imported\n", done.stderr
        assert "lesionsynth's CPU kernels must be compiled" in done.stderr.splitlines()[-1]
        assert "unset NUMBA_DISABLE_JIT, which is 1" in done.stderr


def test_commands_without_a_compiler(tmp_path) -> None:
    """They say so at once, in one line."""
    with trial("unwritable"):
        command = [sys.executable, "-m", "lesionsynth", "preview", "--output", str(tmp_path / "x.png")]
        done = run(command, NUMBA_DISABLE_JIT="1", PYTHONPATH=str(REPOSITORY))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "unset NUMBA_DISABLE_JIT, which is 1" in done.stderr


PAIR = """
import hashlib, numpy as np, lesionsynth as ls
z, y, x = np.indices((8, 40, 48))
mask = (y - 20) ** 2 + (x - 24) ** 2 < 350
image = ((z * 7 + y * 13 + x * 29) % 31 / 60 * mask).astype(np.float32)
digest = hashlib.sha256()
for kind in ("float32", "float64", "float16"):
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=1)
    pair = synth(image.astype(kind), mask, index=5, lung_fraction=0.3)
    for array in (pair.image, pair.target, pair.labels):
        digest.update(array.tobytes())
for array in (ls.ops.gaussian_filter(image, 1.5), ls.ops.uniform_filter(image, 5)):
    digest.update(array.tobytes())
print(digest.hexdigest())
"""

SWITCHES = {
    "NUMBA_CPU_NAME": "generic", "NUMBA_OPT": "0", "NUMBA_BOUNDSCHECK": "1", "NUMBA_DISABLE_INTEL_SVML": "1",
    "NUMBA_LOOP_VECTORIZE": "0", "NUMBA_ENABLE_AVX": "0", "NUMBA_DEBUGINFO": "1",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_of_numba(name, tmp_path) -> None:
    """None changes a bit of a pair, on a processor without vectors and half precision either."""
    environment = {"LESIONSYNTH_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
    with trial("unwritable"):
        expected = run([sys.executable, "-c", PAIR], PYTHONPATH=str(REPOSITORY))
        found = run([sys.executable, "-c", PAIR], **environment, **{name: SWITCHES[name]})
        assert expected.returncode == 0, expected.stderr
        assert found.stdout == expected.stdout, found.stderr
