"""A session on a GPU, with other parts in the place of its own: limits, logs, records, and what is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import processes, session, session_findings
from benchmarks.session_findings import ROOT, Place
from benchmarks.session_parts import SANITIZED, Command, Part, gpu_tests, parts
from tests.gpu import devices

PYTHON = (sys.executable, "-S", "-c")
LIMIT_S = 60.0
"""Of what ends by itself, however slow the machine."""


def part(name: str, *argv: str, limit_s: float = LIMIT_S, needs: str = "", **found) -> Part:
    return Part(name, (Command("command", argv, limit_s),), lambda place, log, since: found, needs)


def ran(*chosen: Part, folder: Path) -> tuple[int, dict]:
    """Run parts; returns the exit status and the summary."""
    status = session.run(chosen, Place(folder, None), session.environment_of(None))
    return status, json.loads((folder / "summary.json").read_text())


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    """Wait a while for a process that was killed: it takes a moment to leave."""
    until = time.monotonic() + LIMIT_S
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not alive(pid)


# --- the command ---


@pytest.mark.skipif(devices() > 0, reason="there is a GPU")
def test_without_a_gpu(capsys, tmp_path) -> None:
    assert session.main(["--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("benchmarks.session needs a CUDA device, but ")
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_asking_for_a_gpu_does_not_import_cupy_here() -> None:
    code = "import sys; from benchmarks import session; session.no_gpu(session.environment_of(None)); "
    code += "print([name for name in sys.modules if name in ('cupy', 'torch')])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT_S
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture
def chosen(monkeypatch):
    """Run nothing, and tell which parts would have been."""
    seen: list[Part] = []
    monkeypatch.setattr(session, "no_gpu", lambda environment: "")
    monkeypatch.setattr(session, "run", lambda chosen, *rest: (seen.extend(chosen), 0)[1])
    return seen


def test_parts_are_chosen_by_name(chosen, capsys) -> None:
    assert session.main([]) == 0
    order = ["versions", "smoke", "tests", "sanitizers", "benchmarks", "training", "profile"]
    assert [one.name for one in chosen] == order
    chosen.clear()
    assert session.main(["--part", "training", "--part", "smoke"]) == 0
    assert [one.name for one in chosen] == ["smoke", "training"]
    with pytest.raises(SystemExit) as refused:
        session.main(["--part", "smok"])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "smok" in message
    assert all(name in message for name in order)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--scale", "0"], "--scale must be > 0, got 0"),
    (["--wheels", "nowhere"], "--wheels must hold wheels (*.whl), got nowhere"),
])  # fmt: skip
def test_bad_arguments_are_refused(chosen, arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        session.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
    assert not chosen


def test_limits_and_their_scale(chosen) -> None:
    place = Place(session.OUTPUT, None)
    limits = {one.name: one.limit_s for one in parts(place)}
    for half in (
        ("versions", "smoke", "tests", "sanitizers"),
        ("versions", "benchmarks", "training", "profile"),
    ):
        assert sum(limits[name] for name in half) <= 360
        assert all(f"--part {name}" in session.__doc__ for name in half)
    session.main(["--scale", "2.5"])
    assert {one.name: one.limit_s for one in chosen} == {name: 2.5 * s for name, s in limits.items()}


def test_results_go_where_the_benchmarks_write_them_unless_told(tmp_path) -> None:
    for results in (None, tmp_path):
        argv = {one.name: one.commands[0].argv for one in parts(Place(tmp_path, results))}
        for name in ("benchmarks", "training"):
            assert ("--output" in argv[name]) == (results is not None)
    assert session.OUTPUT == ROOT / "runs" / "gpu"


def test_every_file_with_gpu_tests_is_run(tmp_path) -> None:
    assert "tests/test_gpu.py" in gpu_tests()
    assert {"tests/normnet/test_data_gpu.py", "tests/normnet/test_predict.py"} <= set(gpu_tests())
    assert "tests/test_gpu_session.py" not in gpu_tests()
    (command,) = next(one for one in parts(Place(tmp_path, None)) if one.name == "tests").commands
    assert set(gpu_tests()) <= set(command.argv)
    assert session.environment_of(None)["REQUIRE_GPU"] == "1"


def test_what_the_sanitizers_look_at_is_there() -> None:
    """A tool whose tests were renamed would look at nothing."""
    text = (ROOT / "tests" / "test_gpu.py").read_text()
    golden = json.loads((ROOT / "tests" / "golden_pairs.json").read_text())
    for _, which in SANITIZED:
        name, *kinds = which.split(" and ")
        assert f"def test_{name}" in text
        assert all(any(kind in one for one in golden) for kind in kinds)


# --- parts that end in every way ---


def test_a_part_that_passes(tmp_path, capsys) -> None:
    status, summary = ran(
        part("good", *PYTHON, "print('hello')", lines=["quick"], answer=42, goals=[]), folder=tmp_path
    )
    assert status == 0
    assert summary["counts"] == {"passed": 1, "failed": 0, "not run": 0}
    assert summary["complete"]
    record = json.loads((tmp_path / "good.json").read_text())
    assert record["status"] == "passed"
    assert record["findings"]["answer"] == 42
    (command,) = record["commands"]
    assert command["command"] == [*PYTHON, "print('hello')"]
    assert (command["returncode"], command["timed_out"], command["limit_s"]) == (0, False, LIMIT_S)
    assert 0 < command["seconds"] <= record["seconds"]
    assert "hello" in (tmp_path / "good.log").read_text()
    shown = capsys.readouterr().out
    assert "good        passed" in shown
    assert "quick" in shown
    assert "1 passed" in shown


def test_parts_that_fail_and_those_behind_them(tmp_path, capsys) -> None:
    fails = "print('all is well'); print('ValueError: 3 voxels differ'); raise SystemExit(7)"
    status, summary = ran(
        part("fails", *PYTHON, fails),
        part("crashes", *PYTHON, "import faulthandler, os; faulthandler.enable(); os.abort()"),
        part("says so", *PYTHON, "", passed=False, lines=["2 of 3 steps"]),
        part("absent", "no-such-program-here"),
        part("optional", "no-such-program-here", needs="no-such-program-here"),
        part("good", *PYTHON, ""),
        folder=tmp_path,
    )
    assert status == 1
    found = {one["name"]: one for one in summary["parts"]}
    assert {name: one["status"] for name, one in found.items()} == {
        "fails": "failed", "crashes": "failed", "says so": "failed", "absent": "failed",
        "optional": "not run", "good": "passed",
    }  # fmt: skip
    assert summary["counts"] == {"passed": 1, "failed": 4, "not run": 1}
    assert found["fails"]["failures"] == ["command ended with 7", "ValueError: 3 voxels differ"]
    assert found["crashes"]["failures"][:2] == ["command ended with -6", "Fatal Python error: Aborted"]
    assert found["optional"]["lines"] == ["no-such-program-here is not installed"]
    assert json.loads((tmp_path / "absent.json").read_text())["commands"][0]["returncode"] == 127
    shown = capsys.readouterr().out
    assert "says so     FAILED" in shown
    assert "2 of 3 steps" in shown
    assert "1 passed, 4 failed, 1 not run" in shown


def test_not_run_is_not_passed(tmp_path) -> None:
    assert ran(part("optional", "nothing", needs="no-such-program-here"), folder=tmp_path)[0] == 1


@pytest.fixture
def limit_reached_when(monkeypatch):
    """Let the limit of 1234 s be reached as soon as a file has been written, however slow the machine."""
    wait = subprocess.Popen.wait

    def use(path: Path) -> float:
        def reached(self, timeout=None):
            if timeout != 1234.0:
                return wait(self, timeout)
            until = time.monotonic() + LIMIT_S
            while not (path.exists() and path.read_text()) and time.monotonic() < until:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired("command", timeout)

        monkeypatch.setattr(subprocess.Popen, "wait", reached)
        return 1234.0

    return use


def test_a_hanging_part_ends_at_its_limit_with_its_children(
    tmp_path, monkeypatch, limit_reached_when
) -> None:
    """Parent and child do not heed SIGABRT."""
    monkeypatch.setattr(processes, "LAST_WORDS_S", 0.1)
    pid, script = tmp_path / "pid", "trap '' ABRT; sleep 600 & echo $! > \"$0\"; wait; wait; sleep 600"
    hangs = part("hangs", "sh", "-c", script, str(pid), limit_s=limit_reached_when(pid))
    status, summary = ran(hangs, part("good", *PYTHON, ""), folder=tmp_path)
    assert status == 1
    assert [one["status"] for one in summary["parts"]] == ["failed", "passed"]
    assert summary["parts"][0]["failures"][0] == "command was ended at its limit of 1234 s"
    assert json.loads((tmp_path / "hangs.json").read_text())["commands"][0]["timed_out"]
    assert gone(int(pid.read_text()))


def test_a_hanging_python_says_where(tmp_path, limit_reached_when) -> None:
    file = tmp_path / "begun"
    code = f"import time\ndef stuck():\n    open({str(file)!r}, 'w').write('yes'); time.sleep(600)\nstuck()"
    hangs = part("hangs", *PYTHON, code, limit_s=limit_reached_when(file))
    _, summary = ran(hangs, folder=tmp_path)
    assert "in stuck" in (tmp_path / "hangs.log").read_text()
    assert summary["parts"][0]["failures"][1] == "Fatal Python error: Aborted"


def test_children_do_not_outlive_their_part(tmp_path) -> None:
    pid = tmp_path / "pid"
    status, _ = ran(part("good", "sh", "-c", 'sleep 600 & echo $! > "$0"', str(pid)), folder=tmp_path)
    assert status == 0
    assert gone(int(pid.read_text()))


def test_logs_are_written_while_a_part_runs(tmp_path) -> None:
    """The command reads its own log."""
    log = tmp_path / "reads.log"
    code = f"import sys; print('so far', flush=True); sys.exit('so far' not in open({str(log)!r}).read())"
    assert ran(part("reads", *PYTHON, code), folder=tmp_path)[0] == 0


def test_every_command_of_a_part_runs_within_its_own_limit(tmp_path) -> None:
    commands = (
        Command("first", (*PYTHON, "raise SystemExit(3)"), LIMIT_S),
        Command("second", ("sleep", "600"), 0.5),
        Command("third", (*PYTHON, "print('here')"), LIMIT_S),
    )
    status, summary = ran(Part("three", commands, lambda *_: {}), folder=tmp_path)
    assert status == 1
    assert summary["parts"][0]["failures"][:2] == [
        "first ended with 3",
        "second was ended at its limit of 0.5 s",
    ]
    log = (tmp_path / "three.log").read_text()
    assert log.index("### first: ") < log.index("### second: sleep 600") < log.index("### third: ")
    assert "\nhere\n" in log


def test_files_of_an_earlier_session_are_not_read(tmp_path) -> None:
    place = Place(tmp_path, tmp_path)
    place.found("smoke").write_text('{"steps": [{"name": "old"}], "failed": []}')
    old = tmp_path / "gpu--old.json"
    old.write_text('{"complete": true}')
    os.utime(old, (time.time() - 100,) * 2)
    one = Part("smoke", (Command("nothing", (*PYTHON, ""), LIMIT_S),), session_findings.read_smoke)
    two = Part("benchmarks", (Command("nothing", (*PYTHON, ""), LIMIT_S),), session_findings.read_benchmarks)
    assert session.run([one, two], place, session.environment_of(None)) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [part["lines"] for part in summary["parts"]] == [
        ["no step passed", "it did not begin"],
        ["no result was written"],
    ]


def test_one_file_has_what_is_there_after_every_part(tmp_path) -> None:
    """So that a session that is cut off leaves it too; an archive within the folder does not hold itself."""
    place, archive = Place(tmp_path / "out", None), tmp_path / "out" / "all.tar.gz"
    look = f"import tarfile; print(sorted(tarfile.open({str(archive)!r}).getnames()))"
    chosen = [part("one", *PYTHON, "print('hello')"), part("two", *PYTHON, look)]
    assert session.run(chosen, place, session.environment_of(None), archive) == 0
    first = ["out/one.json", "out/one.log", "out/summary.json"]
    assert str(first) in (tmp_path / "out" / "two.log").read_text()
    with tarfile.open(archive) as tar:
        assert tar.getnames() == sorted([*first, "out/two.json", "out/two.log"])
        assert b"hello" in tar.extractfile("out/one.log").read()


def test_findings_that_cannot_be_read_are_a_failure(tmp_path) -> None:
    def broken(place, log, since):
        raise KeyError("batches")

    status, summary = ran(Part("odd", (Command("nothing", (*PYTHON, ""), LIMIT_S),), broken), folder=tmp_path)
    assert status == 1
    assert summary["parts"][0]["lines"] == ["unreadable: KeyError: 'batches'"]


@pytest.mark.skipif(devices() > 0, reason="there is a GPU")
def test_a_part_of_the_session_itself(tmp_path) -> None:
    """From a checkout, with this Python: versions, which then finds no device."""
    place = Place(tmp_path, tmp_path)
    chosen = [one for one in parts(place, 10) if one.name == "versions"]
    assert session.run(chosen, place, session.environment_of(None)) == 1
    record = json.loads((tmp_path / "versions.json").read_text())
    assert record["commands"][0]["returncode"] == 1
    assert record["findings"]["libraries"]["numpy"]
    assert "Error" in record["findings"]["device"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "summary.json",
        "versions.json",
        "versions.log",
    ]


# --- wheels ---


def wheel(folder: Path, name: str = "hello_wheel") -> Path:
    """Write the smallest package."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "SAID = 'from a wheel'\n")
        info = f"{name}-1.0.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_there_for_the_parts_and_gone_afterwards(tmp_path, monkeypatch) -> None:
    wheel(tmp_path / "wheels")
    code = "import hello_wheel; print(hello_wheel.__file__, hello_wheel.SAID)"
    mine = part("uses", sys.executable, "-c", code)
    monkeypatch.setattr(session, "no_gpu", lambda environment: "")
    monkeypatch.setattr(session, "parts", lambda place, scale=1.0: [mine])
    out = tmp_path / "out"
    assert session.main(["--wheels", str(tmp_path / "wheels"), "--output", str(out)]) == 0
    last = (out / "uses.log").read_text().splitlines()[-1]
    assert last.endswith("from a wheel")
    assert not Path(last.split()[0]).exists()


def test_wheels_that_cannot_be_installed(tmp_path, capsys) -> None:
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("no zip file")
    assert session.main(["--wheels", str(tmp_path)]) == 2
    assert "cannot be installed" in capsys.readouterr().err


# --- what is read ---

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="4">
<testcase classname="tests.test_gpu" name="test_good" time="0.1" />
<testcase classname="tests.test_gpu" name="test_bad" time="0.1">
  <failure message="AssertionError: 3 voxels&#10;more">trace</failure></testcase>
<testcase classname="tests.test_gpu" name="test_idle">
  <skipped type="pytest.skip" message="one device" /></testcase>
<testcase classname="" name="tests.normnet.test_data_gpu">
  <error message="collection failure">ImportError</error></testcase>
</testsuite></testsuites>"""


def test_junit() -> None:
    found = session_findings.junit(JUNIT)
    assert found["counts"] == {"passed": 1, "failed": 1, "error": 1, "skipped": 1}
    assert found["failed"] == [
        "tests.test_gpu::test_bad: AssertionError: 3 voxels",
        "tests.normnet.test_data_gpu: collection failure",
    ]
    assert found["skipped"] == ["tests.test_gpu::test_idle: one device"]


@pytest.mark.parametrize(("text", "passed", "line"), [
    (JUNIT, False, "1 passed, 1 failed, 1 error, 1 skipped"),
    ('<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>', True, "1 passed"),
    ('<testsuites><testsuite><testcase name="b"><skipped/></testcase></testsuite></testsuites>', False,
     "0 passed, 1 skipped"),
    ("<testsuites><testsuite/></testsuites>", False, "0 passed"),
])  # fmt: skip
def test_tests_pass_where_some_passed_and_none_failed(tmp_path, text, passed, line) -> None:
    place = Place(tmp_path, None)
    assert not session_findings.read_tests(place, "", 0.0)["passed"]  # no file
    place.found("tests", "xml").write_text(text)
    found = session_findings.read_tests(place, "", 0.0)
    assert (found["passed"], found["lines"][0]) == (passed, line)


def test_a_real_result_of_pytest_is_read(tmp_path) -> None:
    file = tmp_path / "test_three.py"
    tests = ["def test_a(): pass", "def test_b(): assert 1 == 2", "@pytest.mark.skip", "def test_c(): pass"]
    file.write_text("\n".join(["import pytest", *tests]))
    place = Place(tmp_path, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command += [f"--junitxml={place.found('tests', 'xml')}", str(file)]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=LIMIT_S).returncode == 1
    found = session_findings.read_tests(place, "", 0.0)
    assert found["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert found["failed"][0].startswith("test_three::test_b: assert 1 == 2")


SANITIZED_LOG = """### memcheck: compute-sanitizer --tool memcheck python
========= COMPUTE-SANITIZER
3 passed
========= ERROR SUMMARY: 0 errors
### racecheck: compute-sanitizer --tool racecheck python
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
### synccheck: compute-sanitizer --tool synccheck python
========= ERROR SUMMARY: 3 errors
========= ERROR SUMMARY: 0 errors
### initcheck: compute-sanitizer --tool initcheck python
Segmentation fault
"""


def test_sanitizers(tmp_path) -> None:
    place = Place(tmp_path, None)
    found = session_findings.read_sanitizers(place, SANITIZED_LOG, 0.0)
    assert found["errors"] == {"memcheck": 0, "racecheck": 2, "synccheck": 3, "initcheck": None}
    assert not found["passed"]
    assert found["lines"][3] == "initcheck: no summary"
    clean, without = SANITIZED_LOG.split("### racecheck")[0], SANITIZED_LOG.split("### initcheck")[1]
    assert session_findings.read_sanitizers(place, clean, 0.0)["passed"]
    assert not session_findings.read_sanitizers(place, "### initcheck" + without, 0.0)["passed"]
    assert not session_findings.read_sanitizers(place, "", 0.0)["passed"]
    assert "RACECHECK SUMMARY: 2" in session_findings.failures(SANITIZED_LOG)[0]
    assert "ERROR SUMMARY: 3" in session_findings.failures(SANITIZED_LOG)[1]


PROFILE_LOG = """==PROF== Connected to process 12 (/usr/bin/python3)
written by the program
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","copy_pair","GPU Speed Of Light Throughput","Duration","us","201.50"
"0","12","copy_pair","GPU Speed Of Light Throughput","DRAM Throughput","%","91.02"
"0","12","copy_pair","Occupancy","Block Limit SM","block","32"
"1","12","inject","GPU Speed Of Light Throughput","Duration","us","6.10"
==PROF== Disconnected
"""


def test_profile(tmp_path) -> None:
    found = session_findings.read_profile(Place(tmp_path, None), PROFILE_LOG, 0.0)
    assert found["kernels"] == {
        "copy_pair": {"Duration": "201.50 us", "DRAM Throughput": "91.02 %"},
        "inject": {"Duration": "6.10 us"},
    }
    assert found["passed"]
    assert found["lines"][1] == "inject: Duration 6.10 us"
    assert not session_findings.read_profile(Place(tmp_path, None), "==ERROR== no permission", 0.0)["passed"]


def test_smoke_that_broke_off(tmp_path) -> None:
    place = Place(tmp_path, None)
    steps = [{"name": "device", "state": "OK"}, {"name": "load", "state": "TRY"}]
    place.found("smoke").write_text(json.dumps({"steps": steps, "failed": ["load"]}))
    found = session_findings.read_smoke(place, "", 0.0)
    assert (found["passed"], found["lines"]) == (False, ["1 of 2 steps passed", "load"])


def test_figures_against_floor_and_goals(tmp_path, capsys) -> None:
    place = Place(tmp_path, tmp_path)
    goals = [{"name": "batch", "value": 0.3, "limit": 0.35, "unit": "ms", "aim": 0.28, "met": True}]
    results = {
        "gpu": "NVIDIA H100", "complete": True, "correctness": {"passed": True},
        "floor": {"seconds": 0.224e-3}, "bandwidth_bytes_s": {"median": 3e12}, "goals": goals,
        "batches": {"8": {"replay": {"device": {"median_s": 0.336e-3}}}},
    }  # fmt: skip
    (tmp_path / "gpu--h100.json").write_text(json.dumps(results))
    found = session_findings.read_benchmarks(place, "", time.time())
    line = "batch of 8 by replay 0.336 ms, 1.50 times its floor of 0.224 ms (3.00 TB/s)"
    assert found["lines"] == [str(tmp_path / "gpu--h100.json"), line]
    assert found["passed"]
    (tmp_path / "gpu--h100.json").write_text(json.dumps(results | {"complete": False}))
    assert not session_findings.read_benchmarks(place, "", time.time())["passed"]  # it was broken off
    _, summary = ran(part("benchmarks", *PYTHON, "", lines=[line], goals=goals), folder=tmp_path)
    assert summary["goals"] == goals
    shown = capsys.readouterr().out
    assert line in shown
    assert "batch: 0.3 ms (goal 0.35, aim 0.28: met)" in shown


def test_ratios_of_training(tmp_path) -> None:
    place = Place(tmp_path, tmp_path)
    ratio = {"median": 1.01, "quartiles": [1.0, 1.02]}
    row = {"on the fly": {"median_s": 1.0}, "on the fly over ready-made": ratio}
    goals = [{"name": "bf16", "value": 1.01, "limit": 1.02, "unit": "", "aim": None, "met": True}]
    results = {"precisions": {"bf16": {"one at a time": row, "in a row": row}}, "goals": goals}
    (tmp_path / "training--h100.json").write_text(json.dumps(results))
    found = session_findings.read_training(place, "", time.time())
    assert found["goals"] == goals
    assert found["lines"][1:] == ["bf16, on the fly over ready-made: 1.0100 (1.0000 to 1.0200)"]
    assert not session_findings.read_training(Place(tmp_path, tmp_path / "empty"), "", 0.0)["passed"]
