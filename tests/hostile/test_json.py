"""Plans, records, stores and configurations that were edited, damaged or made to hurt: one line, at once."""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lesionsynth as ls
from lesionsynth import cli, strict
from lesionsynth._samples import read_plan
from lesionsynth._samples import read_record as read_sample
from normnet import config as configs
from normnet.baselines.methods import BaselineConfig
from normnet.baselines.methods import paper as paper_baseline
from normnet.config import PredictConfig, TrainConfig
from normnet.output import read_record, read_records
from normnet.predict import read_config as read_settings
from normnet.prepare.store import Case, Store
from tests.hostile.bounds import RENDERED, at_once
from tests.hostile.tally import trial
from tests.plans import blob, plan, renderer

KIND = "json"
MEBIBYTES = 64
"""Of a document: the longest takes 40."""
RELATED = {"shape": ("mask_counts", "segments"), "accumulate": ("batch_size",), "size": ("channels",)}
"""Fields that may be told in place of another, as they fit no more."""


def predicted() -> dict[str, Any]:
    """Return the record of a prediction."""
    return {
        "case": "p1", "ct": "/scans/p1.nii.gz", "series": None, "lungs_from": "network",
        "lungs_sha256": "0" * 64,
        "ct_stamp": {"files": 1, "bytes": 10, "modified_ns": 1_700_000_000_000_000_000, "listing": "ab"},
        "settings": json.loads(configs.to_json(PredictConfig())),
        "models": [{"name": "model-0", "sha256": "0" * 64, "probability": 0.5, "threshold_hu": -700.0}],
        "volumes": {"lung_ml": 4000.0, "lesion_ml": 10.0, "percent": 0.25, "right_lung_ml": None},
        "files": {"lesions": "p1_lesions.nii.gz", "lung": "p1_lung.nii.gz", "classical": None, "core": None},
        "inflation": 0.9,
    }  # fmt: skip


def rendered() -> dict[str, Any]:
    """Return a plan with what it became."""
    image = np.zeros((12, 40, 44), np.float32)
    pair = renderer().render(plan(blob(), blob(1, center=(6, 20, 30))), image, np.ones(image.shape, bool))
    return json.loads(pair.plan.to_json())


SAMPLE = {
    "format": "lesionsynth.record", "version": 1, "lesionsynth": "0.1.0", "source": {"phantom_seed": 0},
    "slab": [3, 35], "spacing": [2.0, 1.4, 1.4], "preset": "covid_lung", "lengths": "mm",
    "hu_range": [-800.0, 100.0],
    "checksums": dict.fromkeys(("hu", "lung_mask", "image", "target", "labels"), "0a1b2c3d"),
}  # fmt: skip
CASE = {"shape": [4, 8, 9], "spacing": [1.0, 0.8, 0.8], "segments": [[0, 4]], "mask_counts": [0, 5, 72, 1]}
STORE = {"format": 1, "spacing": [1.0, 0.8, 0.8], "size": 512}


def _config(cls: type[Any]) -> Callable[[Path], Any]:
    return lambda path: configs.read_config(cls, path)


DOCUMENTS: dict[str, tuple[str, Any, Callable[[Path], Any]]] = {
    "plan": ("plan.json", rendered(), read_plan),
    "sample": ("record.json", SAMPLE, read_sample),
    "prediction": ("p1.json", predicted(), read_record),
    "train": ("config.json", json.loads(configs.to_json(configs.few())), _config(TrainConfig)),
    "lungs": ("config.json", json.loads(configs.to_json(configs.lungs())), _config(TrainConfig)),
    "predict": ("settings.json", json.loads(configs.to_json(PredictConfig())), read_settings),
    "baseline": (
        "config.json",
        json.loads(configs.to_json(paper_baseline("gmvae"))),
        _config(BaselineConfig),
    ),
    "store": ("store.json", STORE, lambda path: Store.open(path.parent)),
    "case": ("meta.json", CASE, lambda path: Case(path.parent)),
}
"""By kind: name of the file, a valid document, what reads it."""
LOOSE = {"prediction": ("ct_stamp", "settings", "lungs_from", "lungs_sha256"), "store": ("format",)}
"""Parts that are taken as they are: compared or looked up, never computed with."""


def leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a document, containers too."""
    yield path
    parts = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in parts:
        yield from leaves(value, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Copy with another value at a place."""
    if not path:
        return value
    whole = copy.deepcopy(document)
    at = whole
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return whole


def write(folder: Path, name: str, text: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, read: Callable[[Path], Any], *words: str) -> str:
    """Fail unless a file is refused, at once, in one line of ASCII that names it and has some words."""
    with at_once(MEBIBYTES), pytest.raises((ValueError, OSError)) as caught:
        read(path)
    said = str(caught.value)
    assert str(path) in said or path.name in said
    assert len(said) < 700
    assert said.isprintable()
    for word in words:
        assert word in said, said
    return said


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_documents_are_read(tmp_path, kind) -> None:
    name, document, read = DOCUMENTS[kind]
    read(write(tmp_path, name, json.dumps(document)))
    read(write(tmp_path, name, b"\xef\xbb\xbf" + json.dumps(document).encode()))  # as some editors begin


RAW = {
    "empty": "",
    "deep list": "[" * 10**6,
    "deep object": '{"a":' * 10**6,
    "closed deep": "[" * 10**5 + "]" * 10**5,
    "cut": '{"seed": 1',
    "text": "seed: 1",
    "number": "3",
    "null": "null",
    "zip": b"PK\x03\x04" + bytes(100),
    "latin": b'{"seed": "\xe9"}',
    "utf-16": json.dumps({"a": 1}).encode("utf-16"),
    "long": " " * (2**24 + 1),
    "quotes": '"\\' * 200_000,
    "open strings": '["' + '\\"' * 300_000,
    "long line": "x" * 10**6,
    "many NaN": "[" + "NaN," * 300_000 + "1]",
    "many doubled keys": "[" + '{"a":1,"a":1},' * 100_000 + "1]",
    "utf-32": json.dumps({"a": 1}).encode("utf-32"),
    "two BOMs": b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "raw surrogate": b'{"\xed\xa0\x80": 1}',
    "escaped twice": '{"seed": 1, "\\u0073eed": 2}',
    "two documents": "{}{}",
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_what_is_no_document(tmp_path, kind) -> None:
    name, _, read = DOCUMENTS[kind]
    for number, text in enumerate(RAW.values()):
        with trial(KIND):
            refused(write(tmp_path / str(number), name, text), read)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_what_is_no_file(tmp_path, kind) -> None:
    """A pipe without a writer would keep its reader waiting, a device would never end."""
    name, _, read = DOCUMENTS[kind]
    for what in ("pipe", "folder", "device", "link", "nothing"):
        path = tmp_path / what / name
        path.parent.mkdir()
        if what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "device":
            path.symlink_to("/dev/zero")
        elif what == "link":
            path.symlink_to(path)
        with trial(KIND):
            refused(path, read)
    with trial(KIND), socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path := tmp_path / "s"))
        with pytest.raises((ValueError, OSError)):
            read(path) if kind not in ("store", "case") else strict.read_json(path)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_numbers_that_json_does_not_bound(tmp_path, kind) -> None:
    """NaN, 1e400, 10^400 and doubled keys at every place: the message says which."""
    name, document, read = DOCUMENTS[kind]
    for path in leaves(document):
        where = path[-1] if path and isinstance(path[-1], str) else ""
        for text, word in (
            ("NaN", "finite"), ("-Infinity", "finite"), ("1e400", "finite"), ("1" + "0" * 400, "digits"),
            ('{"a": 1, "b": 2, "a": 3}', "twice"), ("[" * 40 + "]" * 40, "deep"),
        ):  # fmt: skip
            with trial(KIND):
                bad = json.dumps(changed(document, path, "@here@")).replace('"@here@"', text)
                refused(write(tmp_path, name, bad), read, word, where if word != "deep" else "")


def wrong_types(value: Any) -> list[Any]:
    """Return JSON values of other types than `value`."""
    many: list[Any] = [
        "5",
        "",
        True,
        None,
        [],
        {},
        [1, 2, 3, 4, 5],
        {"a": 1},
        "\x1b[31m\n" * 3,
        "\udc80",
        "x" * 10**5,
    ]
    if not isinstance(value, int | float) or isinstance(value, bool):
        many += [5, 0.5]
    return [v for v in many if type(v) is not type(value)]


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_every_field_has_one_type(tmp_path, kind) -> None:
    """Another type is refused, or it is one that the field takes: null, or a list of any length."""
    name, document, read = DOCUMENTS[kind]
    optional = 0
    for path in leaves(document):
        if path and path[0] in LOOSE.get(kind, ()):
            continue
        was = document
        for key in path:
            was = was[key]
        for value in wrong_types(was):
            file = write(tmp_path, name, json.dumps(changed(document, path, value)))
            with trial(KIND):
                try:
                    refused(file, read, path[-1] if path and isinstance(path[-1], str) else "")
                except pytest.fail.Exception:
                    assert (
                        value is None or was in (None, "calibrated") or isinstance(value, list | dict | str)
                    )
                    optional += 1
    assert optional < 60


OPTIONAL = ("components", "mode", "edge", "value_range", "load", "center", "placement", "weight", "changed",
            "lengths", "hu_range")  # fmt: skip
"""Fields with a default, which earlier versions lack or people leave out."""


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_fields_missing_and_unknown(tmp_path, kind) -> None:
    name, document, read = DOCUMENTS[kind]
    whole = kind in ("plan", "sample", "case")
    for path in leaves(document):
        if not path or not isinstance(path[-1], str):
            continue
        without = copy.deepcopy(document)
        at = without
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        if kind == "plan" and path[-1] in OPTIONAL:
            with trial(KIND):
                read(write(tmp_path, name, json.dumps(without)))
        elif kind == "plan" or (
            whole and len(path) == 1 and path[0] not in ("preset", "lengths", "hu_range")
        ):
            with trial(KIND):
                refused(write(tmp_path, name, json.dumps(without)), read, path[-1])
    if kind in ("plan", "train", "lungs", "predict", "baseline", "sample"):
        for path in leaves(document):
            at = document
            for key in path:
                at = at[key]
            if isinstance(at, dict) and path != ("checksums",):
                with trial(KIND):
                    more = changed(document, (*path, "colour\n\x1b[2J"), 1)
                    refused(write(tmp_path, name, json.dumps(more)), read, "colour")


EXTREME = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(10**20) + 1, 10**20 - 1),
    st.sampled_from([0, -0.0, 5e-324, -1, 1, 2**31, 2**32, 2**53, 1e300, -1e300, 1e9, 30_000]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), value=EXTREME)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_extreme_numbers(tmp_path, kind, data, value) -> None:
    """Refused with the field's name, or taken; a plan that is taken is rendered."""
    name, document, read = DOCUMENTS[kind]
    numbers = []
    for path in leaves(document):
        at = document
        for key in path:
            at = at[key]
        if isinstance(at, int | float) and not isinstance(at, bool) and path[0] not in LOOSE.get(kind, ()):
            numbers.append(path)
    path = data.draw(st.sampled_from(numbers))
    file = write(tmp_path, name, json.dumps(changed(document, path, value)))
    with trial(KIND):
        try:
            with at_once(MEBIBYTES):
                found = read(file)
        except ValueError as error:
            said = str(error)
            field = next(key for key in reversed(path) if isinstance(key, str))
            assert any(name in said for name in (field, "shape", *RELATED.get(field, ())))
            assert file.name in said
            assert len(said) < 700
            return
        if kind == "plan" and found.shape == (12, 40, 44):
            image = np.zeros((12, 40, 44), np.float32)
            try:
                with at_once(RENDERED):
                    pair = renderer().render(found, image, np.ones(image.shape, bool))
            except ValueError as error:
                said = str(error)
                assert "center" in said
                return
            assert np.isfinite(pair.image).all()
            assert 0 <= pair.image.min() <= pair.image.max() <= 1
            assert ls.LesionPlan.from_json(pair.plan.to_json()) == pair.plan


def test_the_first_place_is_told() -> None:
    """Of many that no document may hold, wherever they are."""
    for text, said in (
        ('{"a": [{"b": 1}, {"b": NaN}], "c": NaN}', "a[1].b must be finite, got NaN"),
        ('{"a": {"b c": [1e999]}}', "a.'b c'[0] must be finite, got '1e999'"),
        ('{"a": {"b": 1, "b": 2}, "c": {"b": 1, "b": 2}}', "a must name a key once, got 'b' twice"),
        ("[0, [], {}, " + "9" * 21 + "]", "[3] must have at most 20 digits, got 21"),
        ('{"a": NaN, "a": 1}', "the document must be finite, got NaN"),
    ):
        with trial(KIND), pytest.raises(ValueError, match="must") as caught:
            strict.parse_json(text)
        assert str(caught.value) == said


def test_records_of_a_sample(tmp_path) -> None:
    """Names are names, and a window is as wide as float32 can divide by."""
    for changes, word in (
        ({"source": {"input": "a/../b.nii"}}, "source.input must be a file's name"),
        ({"source": {"mask": ""}}, "source.mask"),
        ({"source": {"input": "\x1b[2J" * 1000}}, "source.input"),
        ({"hu_range": [0.0, 5e-324]}, "hu_range"),
        ({"hu_range": [-500.0, -500.0]}, "hu_range"),
        ({"preset": "x" * 10**5}, "preset"),
        ({"lengths": "mm\n"}, "lengths"),
    ):
        with trial(KIND):
            refused(write(tmp_path, "record.json", json.dumps(SAMPLE | changes)), read_sample, word)


def test_the_task_of_a_store(tmp_path) -> None:
    """One of those that there are; a store that says nothing is for lesions."""
    for task in ("lesions", "lungs"):
        store = {"format": 1, "task": task}
        assert Store.open(write(tmp_path, "store.json", json.dumps(store)).parent).meta["task"] == task
    for task in ("", "lung", "LUNGS", "x" * 10**5, "\x1b[2J", 5, True, None, [], ["lungs"], {}, {"lungs": 2}):
        with trial(KIND):
            bad = write(tmp_path, "store.json", json.dumps(STORE | {"task": task}))
            refused(bad, lambda path: Store.open(path.parent), "task must be")


def test_files_of_a_record_are_names(tmp_path) -> None:
    """Of the outline by thresholds too, which not every case has."""
    for kind in ("classical", "lung"):
        for name in ("../p1.nii.gz", "/etc/passwd", "a/b", ".", "..", "", ".p1_lung.nii.gz", "a\0b", 5, []):
            record = predicted()
            record["files"][kind] = name
            with trial(KIND):
                refused(write(tmp_path, "p1.json", json.dumps(record)), read_record, "files.", kind)
    record = predicted()
    for name in (None, "p1_classical.nii.gz"):
        record["files"]["classical"] = name
        assert read_record(write(tmp_path, "p1.json", json.dumps(record)))["files"]["classical"] == name


def test_a_record_of_an_earlier_version(tmp_path) -> None:
    """Its lungs are by thresholds, by the name of then, and no weights are told."""
    record = predicted() | {"lungs_from": "thresholds"}
    del record["lungs_sha256"], record["files"]["classical"]
    found = read_record(write(tmp_path, "p1.json", json.dumps(record)))
    assert (found["lungs_from"], found["lungs_sha256"], found["label"]) == ("classical", None, None)


ARRAYS: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "nothing": lambda path, good: None,
    "pipe": lambda path, good: os.mkfifo(path),
    "folder": lambda path, good: path.mkdir(),
    "device": lambda path, good: path.symlink_to("/dev/zero"),
    "empty": lambda path, good: path.write_bytes(b""),
    "zeros": lambda path, good: path.write_bytes(bytes(5000)),
    "NaN": lambda path, good: _stored(path, np.full(good.shape, np.nan)),
    "wider numbers": lambda path, good: _stored(path, good.astype(np.int64) + 10**9),
    "text": lambda path, good: _stored(path, good.astype("S2")),
    "deeper": lambda path, good: _stored(path, np.concatenate([good, good])),
    "flat": lambda path, good: _stored(path, good.ravel()),
}


def _stored(path: Path, array: np.ndarray) -> None:
    pytest.importorskip("blosc2").asarray(np.ascontiguousarray(array), urlpath=str(path), mode="w")


def _case(folder: Path) -> tuple[Case, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    hu, mask = rng.integers(-1000, 100, (6, 9, 8)).astype(np.int16), rng.random((6, 9, 8)) > 0.5
    case = Store.create(folder, {"spacing": [1.0, 1.0, 1.0], "size": 9}).add("a", hu, mask)
    return case, {"hu": hu, "mask": mask.view(np.uint8)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_arrays_of_a_store(tmp_path) -> None:
    """What is another array than the meta data tell is refused by name, not read as it comes."""
    for name in ("hu", "mask"):
        for kind, make in ARRAYS.items():
            case, good = _case(tmp_path / f"{name} {kind}")
            assert case.is_whole()
            path = tmp_path / f"{name} {kind}" / "cases" / "a" / f"{name}.b2nd"
            path.unlink()
            make(path, good[name])
            with trial(KIND):
                assert not case.is_whole()
                with pytest.raises(ValueError, match=rf"{name}\.b2nd: must be an array of") as caught:
                    case.slab(0, 6)
                assert str(caught.value).isprintable()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_of_a_store_that_changed(tmp_path, data) -> None:
    """Refused by name, or read as an array of the right shape."""
    case, _ = _case(tmp_path / "store") if not (tmp_path / "store").exists() else (None, None)
    path = tmp_path / "store" / "cases" / "a" / "hu.b2nd"
    if case is not None:
        (tmp_path / "good").write_bytes(path.read_bytes())
    raw = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, len(raw) // 2]))]))
    with trial(KIND):
        try:
            hu, _ = Case(path.parent).slab(0, 6)
        except ValueError as error:
            said = str(error)
            assert "hu.b2nd" in said
            return
        assert (hu.shape, hu.dtype) == ((6, 9, 8), np.int16)


def test_a_line_that_names_the_part(tmp_path) -> None:
    """The place in a list, and the value shortened."""
    document = json.loads(plan(blob(), blob(1)).to_json())
    for change, words in (
        (lambda d: d["blobs"][1].update(sigma_a=1e9), ("plan.json: blobs[1].sigma_a must be", "1000000000")),
        (lambda d: d["blobs"][1].update(sigma_a="x" * 10**6), ("blobs[1].sigma_a must be a number",)),
        (lambda d: d["blobs"][0].update(semi_axes=[1e300, 1.0, 1.0]), ("blobs[0].semi_axes", "1e+300")),
        (lambda d: d.update(blobs=d["blobs"] * 15_000), ("blobs must be at most 1024, got 30000",)),
        (lambda d: d.update(models=5), ("models",)),
    ):
        bad = copy.deepcopy(document)
        change(bad)
        with trial(KIND):
            refused(write(tmp_path, "plan.json", json.dumps(bad)), lambda p: read_plan(p), *words)


def test_one_damaged_record_leaves_the_others(tmp_path) -> None:
    """A folder of maps: the damaged case is told of, the other is read."""
    for name in ("p1", "p2"):
        write(tmp_path, f"{name}_lesions.nii.gz", b"map")
    good = predicted() | {"case": "p2"}
    write(tmp_path, "p2.json", json.dumps(good))
    texts = [json.dumps(predicted() | {"models": 5}), *(t for t in RAW.values())]
    for text in texts:
        write(tmp_path, "p1.json", text)
        with trial(KIND):
            records, failures = read_records(tmp_path)
            assert [r["case"] for r in records] == ["p2"]
            assert list(failures) == ["p1"]
            assert "p1.json" in failures["p1"]
    write(tmp_path, "p1.json", texts[0])
    assert "models: Input should be a valid list, got 5" in read_records(tmp_path)[1]["p1"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_replay_says_one_line(tmp_path, capfd) -> None:
    """The command, on what the issue names: exit code 2 and one line."""
    file = tmp_path / "plan.json"
    good = plan(blob(), shape=None).to_json()
    for text in (
        "[" * 10**6, good.replace('"seed": 5', '"seed": 1' + "0" * 400), good.replace('"tau"', '"seed"'),
        good.replace('"blobs": [', '"blobs": 5, "other": ['), good.replace('"seed": 5', '"seed": NaN'), None,
    ):  # fmt: skip
        if text is None:
            file.unlink()
            os.mkfifo(file)
        else:
            file.write_text(text)
        with trial(KIND):
            assert cli.main(["replay", str(file)]) == 2
            said = capfd.readouterr().err
            assert said.count("\n") == 1
            assert "plan.json" in said


def test_names_and_values_stay_on_one_line() -> None:
    assert strict.name_of("a\nb\x1b[2J\udc80") == "a\\nb\\x1b[2J\\udc80"
    for value in ("x" * 10**6, 10**10_000, [10**5000] * 10**4, {"\n": "\x1b"}, np.float64(3), "é\n"):
        with trial(KIND):
            text = strict.shown(value)
            assert text.isascii()
            assert text.isprintable()
            assert len(text) < 400
    assert strict.shown(np.float64(3)) == "3.0"
