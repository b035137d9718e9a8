"""The CT of predictions: DICOM folders, nested folders and files, under the names that a prediction gave."""

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
from lesionsynth.io import find_sources, split_name
from normnet.evaluate import EvaluateConfig, evaluate, load_case, main
from normnet.pairing import find_cases, find_patients, read_table
from tests.test_io import volume, write_series

SHAPE = (6, 6, 7)
HU = {seed: volume(seed, SHAPE) for seed in range(4)}


def write(folder, seed=0, **changes):
    """A series of its own HU; several may lie in one folder."""
    names = [f"{seed}-{z}.dcm" for z in range(SHAPE[0])]
    return write_series(folder, HU[seed], names=names, **changes)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def predicted(tmp_path, inputs, *, series="largest", recorded=True):
    """Maps and truth of every CT, with the records that `normnet.predict` leaves."""
    sources = find_sources(inputs, series=series, case_of=lambda path: split_name(path)[0])
    for source in sources:
        ct = io.read_ct(source.path, source.series)
        lesions = np.zeros(ct.hu.shape, bool)
        lesions[2:4, 2:4, 2:4] = True
        name = f"{source.case}_lesions.nii.gz"
        ct.write_like(lesions, tmp_path / "maps" / name)
        ct.write_like(np.ones_like(lesions), tmp_path / "maps" / f"{source.case}_lung.nii.gz")
        ct.write_like(lesions, tmp_path / "truth" / f"{source.case}_lesion.nii.gz")
        record = {"ct": str(source.path), "series": source.series, "files": {"lesions": name}}
        if recorded:
            (tmp_path / "maps" / f"{source.case}.json").write_text(json.dumps(record))
    return [source.case for source in sources]


def pair(tmp_path, *ct):
    files = find_cases(predictions=[tmp_path / "maps"], truth=[tmp_path / "truth"], ct=ct)
    return {one.case: one for one in files}


def hu_of(files):
    return load_case(files).hu


@pytest.mark.parametrize("recorded", [True, False])
def test_folder_of_dicom_folders(tmp_path, recorded):
    scans = tmp_path / "scans"
    uids = {"p1": write(scans / "p1", 1), "p2": write(scans / "deep" / "p2", 2)}
    save(scans / "deep" / "p3_hu.nii.gz", HU[3])
    assert sorted(predicted(tmp_path, [scans], recorded=recorded)) == ["p1", "p2", "p3"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pair(tmp_path, scans)
    assert {case: one.series for case, one in found.items()} == {**uids, "p3": None}
    assert (found["p1"].ct, found["p3"].ct) == (scans / "p1", scans / "deep" / "p3_hu.nii.gz")
    for case, seed in (("p1", 1), ("p2", 2), ("p3", 3)):
        assert np.array_equal(hu_of(found[case]), HU[seed])
    places = {"predictions": tmp_path / "maps", "truth": tmp_path / "truth", "ct": scans}
    call = [text for name, place in places.items() for text in (f"--{name}", str(place))]
    call += ["--output", str(tmp_path / "results"), "--control-voxels", "0", "--pictures", "0"]
    assert main(call) == 0
    document = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {case: one["dsc"] for case, one in document["cases"].items()} == {"p1": 1.0, "p2": 1.0, "p3": 1.0}


def test_the_series_is_the_one_that_was_predicted(tmp_path):
    scans = tmp_path / "scans"
    uids = [write(scans / "p1", seed) for seed in (0, 1)]
    assert predicted(tmp_path, [scans], series=max(uids)) == ["p1"]  # without a choice, the lesser
    own = pair(tmp_path, scans)["p1"]
    assert own.series == max(uids)
    assert np.array_equal(hu_of(own), HU[uids.index(max(uids))])
    (tmp_path / "maps" / "p1.json").rename(tmp_path / "p1.json")
    with pytest.warns(UserWarning, match=f"several DICOM series; taking {min(uids)}"):
        assert pair(tmp_path, scans)["p1"].series == min(uids)
    (tmp_path / "p1.json").rename(tmp_path / "maps" / "p1.json")
    # whatever the folder is called by now
    (scans / "p1").rename(scans / "moved")
    assert pair(tmp_path, scans)["p1"].ct == scans / "moved"
    table = tmp_path / "cases.csv"
    table.write_text(
        "case,ct,lesion,prediction\nx,scans/moved,truth/p1_lesion.nii.gz,maps/p1_lesions.nii.gz\n"
    )
    assert read_table(table)[0].series == max(uids)
    table.write_text("case,ct,lesion,prediction\nx,a.nii,truth/p1_lesion.nii.gz,maps/p1_lesions.nii.gz\n")
    assert read_table(table)[0].series is None


def test_every_series_of_a_folder(tmp_path):
    uids = [write(tmp_path / "scans" / "p1", seed) for seed in (0, 1)]
    for recorded in (True, False):
        assert predicted(tmp_path, [tmp_path / "scans"], series="all", recorded=recorded) == [
            "p1_s1",
            "p1_s2",
        ]
        found = pair(tmp_path, tmp_path / "scans")
        assert [one.series for one in found.values()] == sorted(uids)
        for path in tmp_path.glob("maps/*.json"):
            path.unlink()


def test_another_series_than_the_predicted_is_refused(tmp_path, capsys):
    scans = tmp_path / "scans"
    uid = write(scans / "p1", 0)
    predicted(tmp_path, [scans])
    for path in scans.glob("p1/*"):
        path.unlink()
    other = write(scans / "p1", 1)
    rule = f"ct of case 'p1' must be the series that was predicted, {uid}, got"
    with pytest.raises(ValueError, match=f"{rule} {other} in {scans / 'p1'}"):
        pair(tmp_path, scans)
    # a file that was made of it will do
    save(tmp_path / "files" / "p1.nii.gz", HU[0])
    assert pair(tmp_path, tmp_path / "files")["p1"].ct == tmp_path / "files" / "p1.nii.gz"
    # of two copies the first
    shutil.rmtree(scans / "p1")
    write(scans / "p1", 0, SeriesInstanceUID=uid)
    shutil.copytree(scans / "p1", scans / "copy")
    assert pair(tmp_path, scans)["p1"].ct == scans / "copy"


def test_names_that_end_in_a_role_and_names_of_folders_above(tmp_path):
    scans = tmp_path / "scans"
    for k, patient in enumerate(("anna", "bert")):
        write(scans / patient / "CT", k)
    save(scans / "carl" / "image.nii.gz", HU[2])
    save(scans / "dora" / "image.nii.gz", HU[3])
    cases = predicted(tmp_path, [scans], recorded=False)
    assert cases == ["anna_CT", "bert_CT", "carl_image", "dora_image"]
    found = pair(tmp_path, scans)
    for k, case in enumerate(("anna", "bert", "carl", "dora")):
        assert np.array_equal(hu_of(found[case]), HU[k])


def test_a_case_predicted_from_its_own_folder(tmp_path):
    for k, site in enumerate(("a", "b")):
        save(tmp_path / "scans" / site / "x.nii.gz", HU[k])
    predicted(tmp_path, [tmp_path / "scans" / "b"])
    assert np.array_equal(hu_of(pair(tmp_path, tmp_path / "scans" / "b")["x"]), HU[1])
    with pytest.raises(ValueError, match=r"ct of case 'x' must be one file or folder, got .*a/x.* and .*b/x"):
        pair(tmp_path, tmp_path / "scans")


def test_roles_by_names_in_one_folder(tmp_path):
    data = tmp_path / "data"
    for name in ("r4_hu", "r4", "r4_lung", "r4_lesion", "r7", "r7_lesion", "r7_mask"):
        (data / f"{name}.nii.gz").parent.mkdir(exist_ok=True)
        (data / f"{name}.nii.gz").touch()
    maps = tmp_path / "maps"
    maps.mkdir()
    for case in ("r4", "r7"):
        (maps / f"{case}_lesions.nii.gz").touch()
    for ct in ([data], sorted(data.iterdir())):  # the folder, and what a shell makes of data/*
        four, seven = find_cases(predictions=[maps], truth=[data], ct=ct, lungs=())
        assert (four.ct.name, seven.ct.name) == ("r4_hu.nii.gz", "r7.nii.gz")
    with pytest.raises(FileNotFoundError, match="gone_lesion"):
        find_cases(predictions=[maps], truth=[data], ct=[data, tmp_path / "gone_lesion.nii"])
    (data / "r7.nii.gz").unlink()
    with pytest.raises(
        ValueError, match=rf"ct must have a file for each prediction; \['r7'\] not found in {data}"
    ):
        find_cases(predictions=[maps], truth=[data], ct=[data])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=rf"\['r4', 'r7'\] not found in {empty}; there: no file of a format"):
        find_cases(predictions=[maps], truth=[data], ct=[empty])


def test_the_outline_by_thresholds_is_no_prediction(tmp_path):
    """It lies among the maps where the lung network disagrees with it."""
    for name in ("maps/p1_lesions", "maps/p1_lung", "maps/p1_classical", "truth/p1_lesion", "ct/p1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    (one,) = find_cases(predictions=[tmp_path / "maps"], truth=[tmp_path / "truth"], ct=[tmp_path / "ct"])
    assert (one.prediction.name, one.lung.name) == ("p1_lesions.nii.gz", "p1_lung.nii.gz")


def test_annotated_patients_with_dicom(tmp_path):
    scans, truth = tmp_path / "scans", tmp_path / "truth"
    uid = write(scans / "p1", 1)
    save(scans / "sub" / "p2_hu.nii.gz", HU[2])
    truth.mkdir()
    for name in ("p1_lesion", "p2_lesion", "p2_lung"):
        (truth / f"{name}.nii.gz").touch()
    one, two = find_patients([scans, truth])
    assert (one.case, one.ct, one.series, one.lung) == ("p1", scans / "p1", uid, None)
    assert (two.ct, two.series) == (scans / "sub" / "p2_hu.nii.gz", None)
    assert two.lung == truth / "p2_lung.nii.gz"
    (truth / "p3_lesion.nii.gz").touch()
    with pytest.raises(ValueError, match=r"patients must have a CT for each truth, got none for .*p3_lesion"):
        find_patients([scans, truth])
    with pytest.raises(ValueError, match="patients must hold at least one lesion truth"):
        find_patients([scans])


def test_evaluate_reads_the_series_of_a_folder_with_several(tmp_path):
    uids = [write(tmp_path / "scans" / "p1", seed) for seed in (0, 1)]
    predicted(tmp_path, [tmp_path / "scans"], series=max(uids))
    config = EvaluateConfig(
        output=tmp_path / "results",
        predictions=(tmp_path / "maps",),
        truth=(tmp_path / "truth",),
        ct=(tmp_path / "scans",),
        control_voxels=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that the largest was read instead
        evaluation = evaluate(config)
    assert not evaluation.failures
    bright = HU[uids.index(max(uids))][2:4, 2:4, 2:4] >= -500
    assert evaluation.scores["p1"]["bright_lesion_voxels"] == bright.sum()


def test_ablation_reads_the_series_of_a_dicom_folder(tmp_path):
    pytest.importorskip("torch")
    from normnet.ablate import AblateConfig
    from normnet.ablate.patients import find_patients as patients_of

    scans = tmp_path / "scans"
    uids = [write(scans / "p1", seed) for seed in (0, 1)]
    chosen = uids.index(min(uids))  # of two that are as large
    ct = io.read_ct(scans / "p1", uids[chosen])
    inside = np.zeros(ct.hu.shape, bool)
    inside[1:-1, 1:-1, 1:-1] = True
    folders = {"truth": tmp_path / "truth", "masks": tmp_path / "lungs"}
    for folder in folders.values():
        ct.write_like(inside, folder / "p1.nii.gz")
    config = AblateConfig(table="modules", output=tmp_path / "out", patients=(scans,), **folders)
    with pytest.warns(UserWarning, match=f"taking {uids[chosen]}"):
        (patient,) = patients_of(config)
    assert (patient.name, patient.identity["series"]) == ("p1", uids[chosen])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert np.array_equal(patient.load().native_hu, HU[chosen])
