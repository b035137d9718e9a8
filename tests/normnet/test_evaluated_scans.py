"""The CT of predictions: DICOM folders and files, wherever they are by now."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("SimpleITK")
pytest.importorskip("pydicom")

import SimpleITK as sitk

import lesionsynth.io as io
from lesionsynth.io import find_sources
from normnet.evaluate import EvaluateConfig, evaluate, main
from tests.normnet.test_evaluate import record_of
from tests.test_io import volume, write_series

SHAPE = (6, 6, 7)
HU = {seed: volume(seed, SHAPE) for seed in range(4)}
INSIDE = (slice(2, 4),) * 3


def write(folder, seed=0, **changes):
    """A series of its own HU; several may lie in one folder."""
    names = [f"{seed}-{z}.dcm" for z in range(SHAPE[0])]
    return write_series(folder, HU[seed], names=names, **changes)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def predicted(tmp_path, inputs, *, series="largest", recorded=True):
    """Maps and truth of every CT, with the records that `normnet.predict` leaves."""
    for source in (sources := find_sources(inputs, series=series)):
        ct = io.read_ct(source.path, source.series)
        lesions = np.zeros(ct.hu.shape, bool)
        lesions[INSIDE] = True
        ct.write_like(lesions, tmp_path / f"maps/{source.case}_lesions.nii.gz")
        ct.write_like(lesions, tmp_path / f"truth/{source.case}.nii.gz")
        if recorded:
            ct.write_like(np.ones_like(lesions), tmp_path / f"maps/{source.case}_lung.nii.gz")
            record_of(tmp_path / "maps", source.case, source.path, series=source.series)
        ct.write_like(np.ones_like(lesions), tmp_path / f"lungs/{source.case}.nii.gz")
    return [source.case for source in sources]


def evaluated(tmp_path, *ct, **changes):
    given = {"predictions": tmp_path / "maps", "truth": tmp_path / "truth", "masks": tmp_path / "lungs"}
    given |= {"ct": ct, "control_voxels": 0, "pictures": 0, "output": tmp_path / "results"}
    return evaluate(EvaluateConfig(**{**given, **changes}))


def bright(seed):
    """What tells one CT from another: each seed has its own number of bright voxels."""
    return int((HU[seed] >= -500).sum())


def bright_of(evaluation):
    assert not evaluation.failures
    kinds = ("bright_healthy_voxels", "bright_lesion_voxels")
    return {case: sum(scores[kind] for kind in kinds) for case, scores in evaluation.scores.items()}


@pytest.mark.parametrize("recorded", [True, False])
def test_folder_of_dicom_folders(tmp_path, recorded):
    scans = tmp_path / "scans"
    write(scans / "p1", 1)
    write(scans / "deep/p2", 2)
    save(scans / "deep/p3_hu.nii.gz", HU[3])
    expected = {"p1": bright(1), "p2": bright(2), "p3_hu": bright(3)}
    assert len(set(expected.values())) == 3
    assert sorted(predicted(tmp_path, [scans], recorded=recorded)) == list(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bright_of(evaluated(tmp_path, scans)) == expected
    places = {"predictions": tmp_path / "maps", "truth": tmp_path / "truth", "masks": tmp_path / "lungs"}
    places["ct"] = scans
    call = [text for name, place in places.items() for text in (f"--{name}", str(place))]
    call += ["--output", str(tmp_path / "results"), "--control-voxels", "0", "--pictures", "0"]
    assert main(call) == 0
    document = json.loads((tmp_path / "results/results.json").read_text())
    assert {case: one["dsc"] for case, one in document["cases"].items()} == dict.fromkeys(expected, 1.0)


def test_the_series_is_the_one_that_was_predicted(tmp_path):
    scans = tmp_path / "scans"
    uids = [write(scans / "p1", seed) for seed in (0, 1)]
    assert bright(0) != bright(1)
    chosen, other = (uids.index(uid) for uid in (max(uids), min(uids)))
    assert predicted(tmp_path, [scans], series=max(uids)) == ["p1"]  # without a choice, the lesser
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that the largest was read instead
        assert bright_of(evaluated(tmp_path, scans)) == {"p1": bright(chosen)}
        assert bright_of(evaluated(tmp_path)) == {"p1": bright(chosen)}
    record = (tmp_path / "maps/p1.json").rename(tmp_path / "p1.json")
    for path in (tmp_path / "maps").glob("*_lung.nii.gz"):
        path.unlink()
    with pytest.warns(UserWarning, match=f"several DICOM series; taking {min(uids)}"):
        assert bright_of(evaluated(tmp_path, scans)) == {"p1": bright(other)}
    record.rename(tmp_path / "maps/p1.json")
    # whatever the folder is called by now
    (scans / "p1").rename(scans / "moved")
    assert bright_of(evaluated(tmp_path, scans)) == {"p1": bright(chosen)}
    table = tmp_path / "cases.csv"
    row = "scans/moved,lungs/p1.nii.gz,truth/p1.nii.gz,maps/p1_lesions.nii.gz"
    table.write_text(f"case,ct,lungs,lesions,prediction\nx,{row}\n")
    alone = {"predictions": None, "truth": None, "masks": None, "cases": table}
    assert bright_of(evaluated(tmp_path, **alone)) == {"x": bright(chosen)}


def test_every_series_of_a_folder(tmp_path):
    uids = sorted(write(tmp_path / "scans/p1", seed) for seed in (0, 1))
    assert predicted(tmp_path, [tmp_path / "scans"], series="all") == ["p1_s1", "p1_s2"]
    records = [json.loads((tmp_path / f"maps/p1_s{k}.json").read_text())["series"] for k in (1, 2)]
    assert records == uids
    expected = {bright(0), bright(1)}
    assert set(bright_of(evaluated(tmp_path, tmp_path / "scans")).values()) == expected


def test_another_series_than_the_predicted_is_refused(tmp_path):
    scans = tmp_path / "scans"
    uid = write(scans / "p1", 0)
    predicted(tmp_path, [scans])
    file = tmp_path / "files/p1.nii.gz"
    io.read_ct(scans / "p1").write_like(HU[0], file)
    for path in scans.glob("p1/*"):
        path.unlink()
    other = write(scans / "p1", 1)
    for ct in ((), (scans,)):
        (failure,) = evaluated(tmp_path, *ct).failures
        assert (failure.case, failure.method) == ("p1", None)
        assert uid in failure.reason
        assert other in failure.reason
    # a file that was made of it will do
    assert bright_of(evaluated(tmp_path, file.parent)) == {"p1": bright(0)}
    # of two copies the first
    shutil.rmtree(scans / "p1")
    write(scans / "p1", 0, SeriesInstanceUID=uid)
    shutil.copytree(scans / "p1", scans / "copy")
    assert bright_of(evaluated(tmp_path, scans)) == {"p1": bright(0)}


def test_files_of_one_name_are_told_by_the_folders_above(tmp_path):
    for k, site in enumerate("ab"):
        save(tmp_path / f"scans/{site}/x.nii.gz", HU[k])
    predicted(tmp_path, [tmp_path / "scans/b"])
    (tmp_path / "scans").rename(tmp_path / "moved")
    assert bright_of(evaluated(tmp_path, tmp_path / "moved")) == {"x": bright(1)}
    (tmp_path / "moved/b").rename(tmp_path / "moved/c")
    (failure,) = evaluated(tmp_path, tmp_path / "moved").failures
    assert "fit equally well" in failure.reason


def test_one_folder_may_hold_the_ct_and_the_truth(tmp_path):
    """The CT of a case is no mask; masks among the CT are no news."""
    data = tmp_path / "data"
    for k, case in enumerate(("r4", "r7")):
        save(data / f"{case}.nii.gz", HU[k])
    predicted(tmp_path, [data])
    for case in ("r4", "r7"):
        shutil.copy(tmp_path / f"truth/{case}.nii.gz", data / f"{case}_lesion.nii.gz")
    evaluation = evaluated(tmp_path, data, truth=data)
    assert bright_of(evaluation) == {"r4": bright(0), "r7": bright(1)}
    assert all(scores["dsc"] == 1.0 for scores in evaluation.scores.values())
    assert not evaluation.passed
    (data / "other.img").touch()
    shutil.copy(data / "r4_lesion.nii.gz", data / "q_lesion.nii.gz")
    passed = {one.path.name for one in evaluated(tmp_path, data, truth=data).passed}
    assert passed == {"other.img", "q_lesion.nii.gz"}


def test_ablation_reads_the_series_of_a_dicom_folder(tmp_path):
    pytest.importorskip("torch")
    from normnet.ablate import AblateConfig, find_patients

    scans = tmp_path / "scans"
    uids = [write(scans / "p1", seed) for seed in (0, 1)]
    chosen = uids.index(min(uids))  # of two that are as large
    ct = io.read_ct(scans / "p1", uids[chosen])
    inside = np.zeros(ct.hu.shape, bool)
    inside[1:-1, 1:-1, 1:-1] = True
    for role in ("truth", "masks"):
        ct.write_like(inside, tmp_path / f"{role}/p1.nii.gz")
    places = {"patients": (scans,), "truth": tmp_path / "truth", "masks": tmp_path / "masks"}
    config = AblateConfig(table="modules", output=tmp_path / "out", **places)
    with pytest.warns(UserWarning, match=f"taking {uids[chosen]}"):
        (patient,) = find_patients(config)
    assert (patient.name, patient.identity["series"]) == ("p1", uids[chosen])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert np.array_equal(patient.load().native_hu, HU[chosen])
