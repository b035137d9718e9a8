"""Closed and full streams, interrupts, a lack of memory: every command ends with its code and one line."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("SimpleITK")

import pandas as pd

from lesionsynth import cli, commands, files
from normnet import evaluate
from normnet.workers import Died, run_parallel
from tests import classical
from tests.hostile.commands import Study, hidden
from tests.hostile.tally import trial

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and shells of POSIX")
ENTRIES = (
    "lesionsynth", "normnet.prepare", "normnet.train", "normnet.predict", "normnet.evaluate",
    "normnet.report", "normnet.model", "normnet.demo", "normnet.ablate", "normnet.baselines",
)  # fmt: skip
SYNTH = "-m lesionsynth synth {0}/a.nii --mask {0}/lung.nii --depth 4 --count 3 --threads 1 --output {0}/out"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """Folder with a small CT and its lungs."""
    import SimpleITK

    import lesionsynth as ls

    chest = ls.phantom.chest_ct(shape=(8, 32, 40), spacing=(8.0, 10.0, 10.0), seed=1)
    for name, array in (("a", chest.hu), ("lung", chest.lung_mask.astype("uint8"))):
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing(chest.spacing[::-1])
        SimpleITK.WriteImage(image, str(tmp_path / f"{name}.nii"))
    return tmp_path


def python(arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = f"{shlex.quote(sys.executable)} {arguments}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=200, check=False, **options
    )


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        ("| head -c 1", 0),
        (">&-", 0),
        ("2>&-", 0),
        (">&- 2>&- <&-", 0),
        (">/dev/full", 1),
        (">/dev/full 2>&-", 1),
    ],
)
def test_streams_that_are_closed_or_full(scan: Path, streams: str, code: int) -> None:
    tmp_path = scan
    with trial("commands"):
        done = python(f"{SYNTH.format(scan)} {streams}; echo ${{PIPESTATUS[0]}} >{tmp_path}/code")
        assert (tmp_path / "code").read_text().strip() == str(code), done.stderr
        if code and "2>&-" not in streams:
            line = "lesionsynth synth: error: standard output cannot be written: No space left on device\n"
            assert done.stderr == line
        else:
            assert done.stderr == ""
        assert len(list((tmp_path / "out").glob("a_*/record.json"))) == 3  # the work is done all the same
        assert not hidden(tmp_path)


@pytest.mark.parametrize("streams", ["| head -c 1", ">&-", ">&- 2>&-"])
@pytest.mark.parametrize("entry", ["lesionsynth", pytest.param("normnet.train", marks=pytest.mark.slow)])
def test_help_into_a_closed_stream(entry: str, streams: str) -> None:
    with trial("commands"):
        done = python(f"-m {entry} --help {streams}")
        assert done.stderr == ""


def interrupted(
    arguments: Sequence[str], number: int, after: Path | float, more: Sequence[float] = ()
) -> tuple[int, str]:
    """Send a signal to the process group of a command once a file is there, or after so many seconds.

    And another after each of so many seconds more.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    if isinstance(after, float):
        time.sleep(after)
    else:
        while not after.exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
    os.killpg(process.pid, number)
    for seconds in more:
        time.sleep(seconds)
        if process.poll() is None:
            os.killpg(process.pid, number)
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (signal.SIGHUP, "its terminal was closed"),
    ],
)
def test_an_interrupt_is_one_line(scan: Path, number: int, word: str) -> None:
    tmp_path = scan / "out"
    call = SYNTH.format(scan).replace("--count 3", "--count 100000").split()
    with trial("commands"):
        found, said = interrupted(call, number, tmp_path / "a_000001/record.json")
        assert (found, said) == (128 + number, f"lesionsynth synth: error: {word}\n")
        assert not hidden(tmp_path)
        for sample in tmp_path.iterdir():
            assert {"pair.npz", "plan.json", "record.json"} == {p.name for p in sample.iterdir()}


@pytest.mark.parametrize("gap", [0.0, 0.002, 0.01, 0.03, 0.1])
def test_ctrl_c_again_and_again_is_one_line(scan: Path, gap: float) -> None:
    """While the first is told, while what is half-done is cleared away, and while Python ends."""
    call = SYNTH.format(scan).replace("--count 3", "--count 100000").split()
    with trial("commands"):
        found, said = interrupted(call, signal.SIGINT, scan / "out/a_000001/record.json", [gap] * 4)
        assert found == 130
        assert said in ("lesionsynth synth: error: interrupted\n", "lesionsynth: interrupted\n")
        assert not hidden(scan / "out")


INTERRUPTED = """
import atexit, os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        global left
        if left < at or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            left -= 1  # from when the command has its handler
            if left == 0:
                signal.raise_signal(signal.SIGINT)

at = left = int(os.environ["INTERRUPT_AT"])
sys.meta_path.insert(0, Finder())
if at == 0:
    atexit.register(signal.raise_signal, signal.SIGINT)
"""
"""A sitecustomize.py: Ctrl-C when the n-th module is looked for, or at the end of the process for 0."""


@pytest.mark.parametrize(
    ("entry", "moments"),
    [("lesionsynth", (0, 1, 40, 300)), ("normnet.train", (1, 100, 800, 2000)), ("normnet.prepare", (0, 500))],
)
def test_an_interrupt_while_modules_load(tmp_path: Path, entry: str, moments: Sequence[int]) -> None:
    """And one while Python ends, with everything done and told."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    call = f"-m {entry} {'info' if entry == 'lesionsynth' else '--help'}"
    for moment in moments:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "INTERRUPT_AT": str(moment)}
        with trial("commands"):
            done = python(call, env=environment)
            if moment == 0:
                assert (done.returncode, done.stderr) == (0, "")
                assert done.stdout
            else:
                assert done.returncode == 130
                assert done.stderr == f"{entry}: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_of_workers_is_one_line(tmp_path: Path, workers: int) -> None:
    study = Study(tmp_path / "study")
    scans = []
    for number in range(6):
        scans.append(str(tmp_path / f"s{number}.nii.gz"))
        os.link(study.root / "ct/p1.nii.gz", scans[-1])
    call = ["-m", "normnet.prepare", *scans, "--output", str(tmp_path / "store"), "--workers", str(workers)]
    call += ["--size", "128", "--spacing", "2", "3", "3", *classical.FLAGS]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        for after in (tmp_path / "store/store.json", tmp_path / "store/cases/s0", 4.0):
            with trial("commands"):
                found, said = interrupted(call, number, after)
                assert "Traceback" not in said
                # while modules are loaded, and when all is done, SIGTERM ends a process by itself
                outside = found == -signal.SIGTERM and (not said or "s5: " in said)
                assert outside or found in (code, 0, 1)
                assert found != code or said.splitlines()[-1] in ("error: interrupted", "error: terminated")
                time.sleep(0.3)
                assert not hidden(tmp_path / "store")


def sleeping(task: tuple[str, float]) -> str:
    folder, seconds = task
    with files.replacing(Path(folder) / f"{seconds}") as beside:
        beside.write_text("half")
        if seconds > 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return "done"


@pytest.mark.slow
def test_a_killed_worker_costs_its_own_task(tmp_path: Path) -> None:
    tasks = [(str(tmp_path), seconds) for seconds in (0.1, 5.0, 0.2, 6.0, 0.3)]
    with trial("commands"):
        found = dict(run_parallel(sleeping, tasks, 2))
        assert [found[n] == "done" for n in range(5)] == [True, False, True, False, True]
        assert isinstance(found[1], Died)
        files.sweep(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["0.1", "0.2", "0.3"]


ERRORS = [
    (KeyboardInterrupt(), 130, "x: interrupted"),
    (ValueError("a\nb"), 2, "x: a b"),
    (FileNotFoundError(errno.ENOENT, "No such file", "f"), 2, "x: [Errno 2] No such file: 'f'"),
    (ImportError("needs y"), 2, "x: needs y"),
    (FloatingPointError("NaN"), 1, "x: NaN"),
    (MemoryError(), 1, "x: not enough memory: MemoryError"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "x: not enough memory: [Errno 12] Cannot"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "x: not enough memory: Default"),
    (ImportError("libz.so: failed to map segment from shared object"), 1, "x: not enough memory: libz"),
    (RuntimeError("can't start new thread"), 1, "x: not enough memory: can't"),
]


@pytest.mark.parametrize(("error", "code", "line"), ERRORS)
def test_every_error_has_its_code(capsys, error: BaseException, code: int, line: str) -> None:
    def body() -> int:
        raise error

    with trial("commands"):
        assert commands.run("x", body, failed=(FloatingPointError,)) == code
        assert capsys.readouterr().err.startswith(line)


def test_an_interrupt_is_told_though_clearing_up_fails(capsys) -> None:
    def body() -> int:
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("Can't close the ZIP file while there is an open writing handle on it")

    with trial("commands"):
        assert commands.run("x", body) == 130
        assert capsys.readouterr().err == "x: interrupted\n"


def test_an_unforeseen_error_is_not_hidden() -> None:
    with pytest.raises(LookupError):
        commands.run("x", lambda: {}[0])


FAILURES = [
    (ModuleNotFoundError("No module named 'SimpleITK'", name="SimpleITK"), ImportError, "pip install"),
    (
        ModuleNotFoundError("No module named '_itk'", name="_itk"),
        ImportError,
        "installed but cannot be loaded",
    ),
    (
        ImportError("libfoo.so.1: cannot open shared object file"),
        ImportError,
        "installed but cannot be loaded",
    ),
    (ImportError("_x.so: failed to map segment from shared object"), MemoryError, "failed to map segment"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError, "Cannot allocate memory"),
    (MemoryError(), MemoryError, "cannot be loaded"),
]


@pytest.mark.parametrize(("error", "kind", "said"), FAILURES)
def test_only_a_missing_package_is_to_be_installed(monkeypatch, tmp_path, error, kind, said) -> None:
    """Whatever imports an optional package: nibabel, matplotlib, lungmask."""
    from lesionsynth import preview
    from lesionsynth.io import nifti
    from normnet.prepare import lungs

    def fail(name: str, package: str | None = None) -> None:
        told = type(error)(*error.args, **({"name": name} if error.args[:1] == FAILURES[0][0].args else {}))
        if isinstance(told, ModuleNotFoundError) and told.name is None:
            told.name = "_itk"
        raise told

    monkeypatch.setattr(importlib, "import_module", fail)
    for call in (
        nifti._nibabel,
        lungs.check_installed,
        lambda: preview._figure(*[None] * 4, [], (1, 1, 1), 0, None),
    ):
        with trial("commands"), pytest.raises(kind, match=said):
            call()


def test_an_address_space_that_is_too_small_is_told(tmp_path: Path) -> None:
    """``ulimit -v``: whatever gives way first, it is memory that lacks, not a package."""
    study = "import SimpleITK, numpy; "
    study += (
        f"SimpleITK.WriteImage(SimpleITK.GetImageFromArray(numpy.zeros((4, 8, 8), 'i2')), '{tmp_path}/a.nii')"
    )
    assert python(f'-c "{study}"').returncode == 0
    use = int(
        python("-c \"import lesionsynth.cli; print(open('/proc/self/statm').read().split()[0])\"").stdout
    )
    page = resource.getpagesize() // 1024
    for extra in (30_000, 60_000, 100_000):
        with trial("commands"):
            command = (
                f"ulimit -v {use * page + extra}; OPENBLAS_NUM_THREADS=1 {sys.executable} -m lesionsynth"
            )
            command += (
                f" preview {tmp_path}/a.nii --mask {tmp_path}/a.nii --threads 1 --output {tmp_path}/a.png"
            )
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
            assert "pip install" not in done.stderr
            assert "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("entry", "kilobytes"),
    [
        *(("lesionsynth", k) for k in (60_000, 200_000, 400_000, 523_000)),
        *(("normnet.report", k) for k in (100_000, 700_000, 900_000, 1_300_000)),
        *(
            pytest.param(entry, k, marks=pytest.mark.slow)
            for entry in ("lesionsynth", "normnet.train", "normnet.prepare")
            for k in (530_000, 620_000, 1_320_000, 1_600_000, 2_000_000)
        ),
    ],
)
def test_too_little_memory_to_load_is_one_line(entry: str, kilobytes: int) -> None:
    with trial("commands"):
        command = f"ulimit -v {kilobytes}; OPENBLAS_NUM_THREADS=1 {sys.executable} -m {entry} --help"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False
        )
        if done.returncode:
            assert done.returncode == 1
            assert done.stderr.startswith(f"{entry}: not enough memory: ")
            assert done.stderr.count("\n") == 1
        else:
            assert done.stderr == ""


def test_a_folder_is_held_until_its_process_ends(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code = "import sys, time; from pathlib import Path; from lesionsynth.files import claimed\n"
    code += f"with claimed(Path('{tmp_path}/run')):\n    print('held', flush=True); time.sleep(60)"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with (
                trial("commands"),
                pytest.raises(ValueError, match="is being written by another process"),
                files.claimed(tmp_path / "run"),
            ):
                pass
        finally:
            process.send_signal(number)
            process.communicate()
        with trial("commands"), files.claimed(tmp_path / "run"), files.claimed(tmp_path / "run"):
            assert not list((tmp_path / "run").iterdir())  # and nothing tells of it


@pytest.mark.slow
def test_two_trainings_never_share_a_folder(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    call = [
        sys.executable,
        "-m",
        "normnet.train",
        "--config",
        str(study.settings),
        "--iterations",
        "30",
        "--output",
    ]
    for number in range(3):
        output = tmp_path / f"run{number}"
        with trial("commands"):
            both = [
                subprocess.Popen(
                    [*call, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
                for _ in range(2)
            ]
            said = [process.communicate(timeout=300)[1] for process in both]
            assert sorted(process.returncode for process in both) == [0, 2]
            loser = next(s for s, process in zip(said, both, strict=True) if process.returncode)
            assert loser.count("\n") == 1
            assert "is being written by another process" in loser or "already holds a run" in loser
            assert not hidden(output)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_has_the_same_wrapper(monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    modules = {"lesionsynth": "lesionsynth.cli"}
    packages = ("prepare", "baselines")
    name = modules.get(entry, f"{entry}.__main__" if entry.partition(".")[2] in packages else entry)
    module = importlib.import_module(name)
    holder = module.commands if hasattr(module, "commands") else module
    monkeypatch.setattr(holder, "run", lambda *_, **__: 130)
    with trial("commands"):
        assert module.main([]) == 130


@given(st.lists(st.text(st.characters(codec=None), max_size=8), min_size=2, max_size=2))
def test_no_table_moves_the_cursor(names: list[str]) -> None:
    """Names of cases and methods are what somebody else wrote."""
    rows = [[name, "1.0"] for name in names]
    table = evaluate.Table("Scores", pd.DataFrame(rows, columns=["case", "DSC"], dtype=object))
    for text, count in ((evaluate.as_text(table.frame), 3), (table.markdown(), 6)):
        lines = text.splitlines()
        assert all(line.isprintable() for line in lines)
        assert len(lines) == count


@pytest.mark.parametrize(
    "cell", ["x" * 300, "/".join(["y" * 200] * 30), "p1\0.nii", "{0}/ct/p1.nii.gz/x.nii", "\x1b[31m"]
)
def test_a_path_that_the_system_refuses_fails_its_own_case(
    study: Study, tmp_path: Path, cell: str, capsys
) -> None:
    good = [
        f"{study.root}/ct/p1.nii.gz",
        f"{study.root}/lesion/p1_lesion.nii.gz",
        f"{study.maps}/p1_lesions.nii.gz",
    ]
    bad = cell.format(study.root)
    rows = [[f"b\x1b[3{n}m", *(bad if n == k else path for k, path in enumerate(good))] for n in range(3)]
    table = "\n".join(
        ",".join(row) for row in (["case", "ct", "lesions", "prediction"], *rows, ["p1", *good])
    )
    (tmp_path / "list.csv").write_text(table)
    call = ["--cases", str(tmp_path / "list.csv"), "--output", str(tmp_path / "out"), "--pictures", "0"]
    with trial("commands"):
        assert evaluate.main(call) == 1
        out, err = capsys.readouterr()
        assert [line.partition(":")[0] for line in err.splitlines()] == ["error"] * 3
        assert all(f"b\\x1b[3{n}m" in line for n, line in enumerate(err.splitlines()))
        assert "\x1b" not in out + err


def test_a_full_disk_is_told_with_the_sample(scan: Path, monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("numpy.savez_compressed", full)
    with trial("commands"):
        assert cli.main(SYNTH.format(scan).split()[2:]) == 2
        said = f"[Errno 28] No space left on device: '{scan}/out/a_000000'"
        assert capsys.readouterr().err == f"lesionsynth synth: error: {said}\n"
        assert not list((scan / "out").iterdir())


def test_a_bar_ends_before_an_error_is_told(study: Study, tmp_path: Path, monkeypatch, capsys) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("normnet.report.look", stop)
    with trial("commands"):
        assert study.calls()["report"](tmp_path) == 130
        assert capsys.readouterr().err.endswith("\nnormnet.report: interrupted\n")
