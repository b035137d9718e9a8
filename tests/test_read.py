"""What a file says, by whatever format and type it says it, and what no file may say without a word."""

from __future__ import annotations

import functools
import gzip
import itertools
import re
import warnings
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import affine_transform, rotate

from lesionsynth import io
from lesionsynth.io import child
from lesionsynth.io.outside import find_padding
from lesionsynth.phantom import chest_ct

LPS = np.diag((-1.0, -1.0, 1.0, 1.0))
SEEDS = st.integers(0, 2**32 - 1)


def geometry(rng: np.random.Generator, decimals: int = 15) -> np.ndarray:
    """Affine (x, y, z index to RAS mm) of a random turn."""
    affine = np.eye(4)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0].round(decimals)
    affine[:3, :3], affine[:3, 3] = turn * rng.uniform(0.5, 4, 3), rng.uniform(-300, 300, 3)
    return affine


def image_of(stored: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """SimpleITK's image of a (z, y, x) array."""
    image, lps = sitk.GetImageFromArray(stored), LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing)
    image.SetOrigin(lps[:3, 3])
    image.SetDirection((lps[:3, :3] / spacing).ravel())
    return image


def save(
    path: Path,
    stored: np.ndarray,
    affine: np.ndarray,
    *,
    slope: float = 1,
    inter: float = 0,
    unit: str = "mm",
) -> Path:
    """Write a (z, y, x) array as it is stored."""
    if ".nii" not in path.name:
        sitk.WriteImage(image_of(stored, affine), str(path), useCompression="packed" in path.name)
        return path
    scale = {"mm": 1, "meter": 1e-3, "micron": 1e3}[unit]
    affine = np.diag([scale, scale, scale, 1]) @ affine
    header = nib.Nifti1Header(endianness=stored.dtype.newbyteorder("=").byteorder.replace("=", "<"))
    if stored.dtype.byteorder == ">":
        header = header.as_byteswapped(">")
    header.set_data_dtype(stored.dtype)
    header.set_data_shape(stored.shape[::-1])
    header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    header.set_sform(affine, 1)
    header.set_xyzt_units(unit)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, inter, 352
    data = header.binaryblock + bytes(4) + stored.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


KINDS = {
    **{
        f"nii-{kind}.nii": {"kind": kind} for kind in ("<i2", ">i2", "<i4", ">i8", "<f4", ">f4", "<f8", ">f8")
    },
    **{
        f"slope-{kind}.nii.gz": {"kind": kind, "slope": slope, "inter": -1024}
        for kind, slope in (("<u2", 1), (">u2", 0.5), ("<i2", 0.25), ("<u4", 0.125), ("<f4", 2), ("<u8", 1))
    },
    "metres.nii": {"unit": "meter"},
    "micrometres.nii.gz": {"unit": "micron"},
    **{
        name: {} for name in ("a.nrrd", "packed.nrrd", "a.nhdr", "a.mha", "packed.mha", "a.mhd", "packed.mhd")
    },
    "float.nrrd": {"kind": "<f4"},
    "float.mha": {"kind": "<f8"},
}


@given(seed=SEEDS)
@pytest.mark.parametrize("name", KINDS)
def test_one_volume_through_every_format(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int
) -> None:
    """The same HU at the same places, of nibabel's affine where nibabel has one."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(2, 9, 3))
    hu, affine = rng.integers(-1000, 400, shape), geometry(rng)
    hu.ravel()[:2] = -1000, 300
    kind = KINDS[name].get("kind", "<i2")
    slope, inter = KINDS[name].get("slope", 1), KINDS[name].get("inter", 0)
    path = save(
        tmp_path_factory.mktemp("read") / name,
        ((hu - inter) / slope).astype(kind),
        affine,
        slope=slope,
        inter=inter,
        unit=KINDS[name].get("unit", "mm"),
    )
    ct = io.read_ct(path)
    assert ct.warnings == ()
    assert_array_equal(ct.grid.from_lps(ct.hu), hu)
    ends = np.array([(*at, 1) for at in np.ndindex(2, 2, 2)]) * (*np.array(shape) - 1, 1)
    lps = (LPS @ affine @ ends[:, [2, 1, 0, 3]].T).T[:, :3]  # of the corners as stored
    # 0.01 mm: the header's floats are of 24 bits, positions of 1,000 mm
    assert np.abs(np.sort(lps, 0) - np.sort(ct.grid.corners(), 0)).max() < 0.01
    index = ct.index_of(lps).round().astype(int)
    stored = [hu[tuple(end[:3])] for end in ends]
    assert_array_equal(ct.hu[tuple(index.T)], stored)
    assert_allclose((ct.affine @ np.c_[index, np.ones(8)].T)[:3].T, lps * (-1, -1, 1), atol=0.01)
    if ".nii" in name and "metres" not in name:  # nibabel does not look at units
        back = nib.load(path)
        assert_allclose(back.affine, affine, atol=0.01)
        assert_allclose((back.affine @ ends[:, [2, 1, 0, 3]].T)[:3].T, lps * (-1, -1, 1), atol=0.01)
        assert_array_equal(np.asarray(back.dataobj).T, hu)


@given(seed=SEEDS, codes=st.tuples(st.integers(0, 4), st.integers(0, 4)), qfac=st.sampled_from((-1, 1)))
def test_nifti_lies_where_nibabel_says(
    tmp_path_factory: pytest.TempPathFactory, seed: int, codes: tuple[int, int], qfac: int
) -> None:
    """By sform where its code is set, else by qform; both, and apart, or neither, is told once."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, 400, (3, 4, 5)).astype(np.int16)
    image = nib.Nifti1Image(hu.T, geometry(rng) * (1, 1, qfac, 1))
    image.set_qform(geometry(rng) * (1, 1, qfac, 1), codes[0])
    image.header["qform_code"], image.header["sform_code"] = codes
    path = tmp_path_factory.mktemp("read") / "a.nii"
    path.write_bytes(image.header.binaryblock[:344] + b"n+1\0" + bytes(4) + hu.tobytes())
    data = bytearray(path.read_bytes())
    data[108:112] = np.float32(352).tobytes()
    data[112:120] = np.array((1, 0), np.float32).tobytes()
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ct = io.read_ct(path)
    assert [str(one.message) for one in told] == list(ct.warnings)
    rule = {(True, True): "mm apart; taking sform", (False, False): "neither sform nor qform is set"}
    expected = rule.get((codes[0] > 0, codes[1] > 0))
    assert len(told) == (expected is not None)
    assert expected is None or expected in ct.warnings[0]
    if any(codes):
        affine = nib.load(path).affine
        index = np.array(list(np.ndindex(3, 4, 5)))
        ras = (affine @ np.c_[index[:, ::-1], np.ones(60)].T)[:3].T
        place = ct.index_of(ras * (-1, -1, 1)).round().astype(int)
        assert_array_equal(ct.hu[tuple(place.T)], hu.ravel())
        assert_allclose((ct.affine @ np.c_[place, np.ones(60)].T)[:3].T, ras, atol=0.01)  # 24 bits
        apart = np.abs(image.get_qform() - image.get_sform())[:3, 3].min()
        assert expected is None or float(re.findall(r"([\d.]+) mm", ct.warnings[0])[0]) >= apart - 0.01


# ---- sheared axes


@given(seed=SEEDS, size=st.floats(-5.5, -0.5), name=st.sampled_from(("a.nii", "a.nrrd", "a.mha")))
def test_shear_is_undone_or_refused(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: float, name: str
) -> None:
    """What rounding leaves passes; up to 1e-3 axes are made orthogonal; from 2e-3 on, it is no rounding."""
    rng = np.random.default_rng(seed)
    affine, shear = geometry(rng), 10**size
    if 1e-3 < shear < 2e-3 or 0.9e-5 < shear < 1.1e-5:
        return  # where the one ends and the other starts is not told here
    upright = affine.copy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    first, second = rng.permutation(3)[:2]
    affine[:3, first] += shear * spacing[first] * affine[:3, second] / spacing[second]
    hu = rng.integers(-1000, 400, (20, 30, 40)).astype(np.int16)
    path = tmp_path_factory.mktemp("read") / name
    if name == "a.nii":
        save(path, hu, affine)
    else:  # SimpleITK may refuse to hold such
        lps = LPS @ affine
        save(path, hu, upright)
        cosines = (lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0)).T
        key, rows = b"TransformMatrix = ", " ".join(f"{v:.12f}" for v in cosines.ravel())
        if name == "a.nrrd":
            key, rows = (
                b"space directions: ",
                " ".join(f"({a:.12f},{b:.12f},{c:.12f})" for a, b, c in lps[:3, :3].T),
            )
        path.write_bytes(re.sub(key + b".*", key + rows.encode(), path.read_bytes(), count=1))
    if shear >= 2e-3:
        with pytest.raises(ValueError, match=r"three orthogonal unit vectors.*resample it"):
            io.read_ct(path)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ct = io.read_ct(path)
    moved = [
        float(mm) for one in told for mm in re.findall(r"a corner moves by ([\d.]+) mm", str(one.message))
    ]
    assert len(moved) == len(told) == (shear > 1e-5)
    cosines = np.array(ct.grid.direction).reshape(3, 3)
    assert np.abs(cosines.T @ cosines - np.eye(3)).max() < 1.1e-5
    # half the shear on either axis: no corner is further from either of the two grids than the whole
    ends = np.array(list(np.ndindex(2, 2, 2))) * (39, 29, 19)
    meant, made = ends @ (LPS @ affine)[:3, :3].T, ends @ (cosines * ct.grid.spacing).T
    apart = np.linalg.norm(meant - made, axis=1).max()
    assert apart <= shear * np.linalg.norm(spacing * (39, 29, 19)) + 1e-3
    assert not moved or moved[0] == pytest.approx(apart, abs=2e-3)  # three decimals, and 24 bits


@given(seed=SEEDS, decimals=st.integers(3, 6))
def test_rounded_cosines_are_read(tmp_path_factory: pytest.TempPathFactory, seed: int, decimals: int) -> None:
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, 400, (3, 4, 5)).astype(np.int16)
    path = save(tmp_path_factory.mktemp("read") / "a.mha", hu, np.diag((1, 1, 1, 1)))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0].round(decimals)
    rows = " ".join(f"{v:.{decimals}f}" for v in turn.T.ravel())
    path.write_bytes(
        re.sub(
            rb"TransformMatrix = .*((.*\n)*)AnatomicalOrientation = .*\n",
            rb"TransformMatrix = " + rows.encode() + rb"\1",
            path.read_bytes(),
        )
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ct = io.read_ct(path)
    assert_array_equal(ct.grid.from_lps(ct.hu), hu)
    assert decimals < 6 or not told


# ---- NaN, infinity, and padding


@functools.cache
def chest(seed: int = 0) -> np.ndarray:
    hu = chest_ct((14, 96, 112), (6.0, 4.0, 4.0), seed).hu
    hu.flags.writeable = False
    return hu


def fields(shape: tuple[int, int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Convex fields of view, by what makes them."""
    z, y, x = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    middle = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    radius = rng.uniform(0.40, 0.5) * shape[1]
    out = {"circle": (y - middle[1]) ** 2 + (x - middle[2]) ** 2 < radius**2 + 0 * z}
    out["ellipse"] = ((y - middle[1]) / radius) ** 2 + ((x - middle[2]) / (1.15 * radius)) ** 2 < 1 + 0 * z
    wide = rng.integers(1, 12, 4)
    out["frame"] = (
        (y >= wide[0]) & (y < shape[1] - wide[1]) & (x >= wide[2]) & (x < shape[2] - wide[3]) & (z > -1)
    )
    out["side"] = (x >= wide[0]) & (y > -1) & (z > -1)
    out["ends"] = (z >= rng.integers(1, 3)) & (z < shape[0] - rng.integers(0, 3)) & (y > -1) & (x > -1)
    for name, axes in (("turned", (1, 2)), ("tipped", (0, 1)), ("leaning", (0, 2))):
        angle = float(rng.uniform(3, 9) * rng.choice((-1, 1)))
        out[name] = rotate(np.ones(shape, np.float32), angle, axes, reshape=False, order=1) > 0.999
    return out


FIELDS = sorted(fields((4, 4, 4), np.random.default_rng(0)))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_nan_outside_the_field_of_view_is_air(tmp_path: Path, name: str, field: str) -> None:
    rng = np.random.default_rng(FIELDS.index(field))
    for seed in range(3):
        hu = chest(seed).astype(np.float32)
        inside = fields(hu.shape, rng)[field]
        path = save(tmp_path / name, np.where(inside, hu, np.nan).astype(np.float32), LPS)
        with pytest.warns(UserWarning, match=f"{(~inside).sum()} voxels outside the field of view are NaN"):
            ct = io.read_ct(path)
        assert_array_equal(ct.hu, np.where(inside, hu, -1024))


def blots(shape: tuple[int, int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Places that are in the body, or that no field of view leaves."""
    z, y, x = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    at = [int(rng.integers(n // 4, 3 * n // 4)) for n in shape]
    low = [int(rng.integers(3, n // 2)) for n in shape[1:]]
    every = (z > -1) & (y > -1) & (x > -1)
    some = (z >= 4) & (z < 8)
    return {
        "voxel": (z == at[0]) & (y == at[1]) & (x == at[2]),
        "ball": (2 * (z - at[0])) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2 < rng.uniform(3, 10) ** 2,
        "corner": (y < low[0]) & (x < low[1]) & every,
        "bite": (y - shape[1]) ** 2 + (x - at[2]) ** 2 < rng.uniform(4, 20) ** 2 + 0 * z,
        "slice": (z == at[0]) & every,
        "half of some slices": some & (x < at[2]) & every,
        "frame of some slices": some & ((x < 4) | (y < 4)) & every,
        "column": (y == at[1]) & (x == at[2]) & every,
    }


BLOTS = sorted(blots((16, 16, 16), np.random.default_rng(0)))


@pytest.mark.parametrize("blot", BLOTS)
@pytest.mark.parametrize("process", ["", "1"])
def test_nan_in_the_body_is_refused(
    tmp_path: Path, blot: str, process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(child.IN_PROCESS, process)
    rng = np.random.default_rng(BLOTS.index(blot))
    for seed, name in enumerate(("a.nii", "a.nrrd", "a.mha")):
        hu = chest(seed).astype(np.float32)
        where = blots(hu.shape, rng)[blot]
        if seed and blot not in (
            "bite",
            "corner",
            "frame of some slices",
        ):  # which may be outside of a circle
            where = where | ~fields(hu.shape, rng)["circle"]
        path = save(tmp_path / name, np.where(where, np.nan, hu).astype(np.float32), LPS)
        first = ", ".join(map(str, np.argwhere(where)[0]))
        with pytest.raises(
            ValueError, match=rf"found {where.sum()} NaN or infinite voxels, the first at \({first}\)"
        ):
            io.read_ct(path)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("field", FIELDS)
def test_infinity_is_refused_wherever_it_is(tmp_path: Path, field: str, value: float) -> None:
    hu = chest().astype(np.float32)
    hu[~fields(hu.shape, np.random.default_rng(1))[field]] = value
    for name in ("a.nii", "a.nrrd", "a.mha"):
        path = save(tmp_path / name, hu, LPS)
        with pytest.raises(
            ValueError, match=f"found {np.isinf(hu).sum()} NaN or infinite voxels, the first at"
        ):
            io.read_ct(path)
    hu = chest().astype(np.float64)
    hu[0, 0, 0] = 1e308
    with pytest.raises(ValueError, match="found 1 NaN or infinite"):
        io.read_ct(save(tmp_path / "a.nii", hu, LPS, slope=100))


FILLS = [32767, 3071, 1000, 40, 0, -1, -200, -500, -880]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("fill", FILLS)
def test_padding_is_air_whatever_its_value(tmp_path: Path, field: str, fill: int) -> None:
    rng = np.random.default_rng(FIELDS.index(field) + 10 * FILLS.index(fill))
    hu = chest(int(rng.integers(3)))
    inside = fields(hu.shape, rng)[field]
    path = save(tmp_path / "a.nii", np.where(inside, hu, fill).astype(np.int16), LPS)
    with pytest.warns(UserWarning, match=rf"{fill} HU fills the outside .* \([\d.]+% of the voxels\)"):
        ct = io.read_ct(path)
    assert (ct.hu[~inside] == -1024).all()
    # none but a few voxels at the rim that have the padding's own value, or lie by air
    assert (ct.hu != hu)[inside].mean() < 0.02


@pytest.mark.parametrize("fill", FILLS)
def test_padding_that_was_blended_with_the_scan(fill: int) -> None:
    """As a registration's resampling leaves it: no shell stands around the air of the field of view."""
    rng = np.random.default_rng(FILLS.index(fill))
    for seed in range(3):
        angle = np.deg2rad(rng.uniform(-8, 8))
        turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
        middle = np.array(chest(seed).shape) / 2
        offset = middle - turn @ middle + rng.uniform(-3, 3, 3) * (0, 1, 1)
        moved, whole = (
            affine_transform(chest(seed).astype(float), turn, offset, order=1, cval=c, mode="grid-constant")
            .round()
            .astype(np.int16)
            for c in (fill, -1024)
        )
        found = find_padding(moved)
        assert found is not None
        assert found[0] == [fill]
        shell = (moved > -700) & (whole < -850)
        left = shell & ~found[1]
        # 0.5 %: where the rim leaves the image at a small angle, or noise in the air reaches it
        assert left.mean() < 5e-3
        assert (found[1] & (whole > -500)).mean() < 5e-3


@pytest.mark.parametrize("around", [-1024, 40, "noise"])
@pytest.mark.parametrize("fill", [32767, 1000, 0, -200])
@pytest.mark.parametrize("inner", ["circle", "ellipse", "turned"])
def test_padding_that_was_padded_again(tmp_path: Path, inner: str, fill: int, around: int | str) -> None:
    """A scanner's circle in a registration's frame: the corners have the value of the frame alone."""
    rng = np.random.default_rng(FILLS.index(fill))
    inside = fields(chest().shape, rng)[inner]
    if inner == "turned":  # so far that something of it is left in the frame
        angle = float(rng.uniform(10, 20))
        inside = rotate(np.ones(inside.shape, np.float32), angle, (1, 2), reshape=False, order=1) > 0.999
    value = -1000 + rng.integers(-20, 20, inside.shape) if around == "noise" else around
    z, y, x = np.indices(inside.shape, sparse=True)
    wide = int(rng.integers(1, 4))
    frame = (np.minimum(y, inside.shape[1] - 1 - y) < wide) | (np.minimum(x, inside.shape[2] - 1 - x) < wide)
    hu = np.where(frame | (z < 0), value, np.where(inside, chest(), fill)).astype(np.int16)
    path = save(tmp_path / "a.nii", hu, LPS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ct = io.read_ct(path)
    assert len(told) == (around != "noise"), "noise is no padding, and what lies in it may be anything"
    if around != "noise":
        assert f"{fill} HU fills the outside" in str(told[0].message)
        assert (ct.hu[frame | ~inside] == -1024).all()


@given(seed=SEEDS, tissue=st.integers(-150, 300), size=st.integers(40, 140), share=st.floats(0.3, 0.98))
def test_constant_tissue_around_lungs_stays(seed: int, tissue: int, size: int, share: float) -> None:
    """Two lungs, or one, of any width and noise, in tissue of one value up to the border."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(8, 30)), size, int(size * rng.uniform(1, 1.3)))
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    places = [(-0.5, 0.45), (0.5, 0.45)] if rng.random() < 0.7 else [(0.0, 0.8)]
    lung = np.any([((x - at) / w) ** 2 + (y / share) ** 2 + (z / 1.3) ** 2 < 1 for at, w in places], axis=0)
    air = rng.uniform(-900, -700) + rng.uniform(0, 30) * rng.normal(size=shape)
    vessels = rng.random(shape) < rng.uniform(0, 0.1)
    hu = np.where(lung, np.where(vessels, tissue + 20, air), tissue).round().astype(np.int16)
    assert find_padding(hu) is None


def lungs(shape: tuple[int, int, int] = (14, 96, 112), apart: float = 0.24) -> np.ndarray:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return np.any(
        [((x - s) / 0.22) ** 2 + (y / 0.5) ** 2 + (z / 1.3) ** 2 < 1 for s in (-apart, apart)], axis=0
    )


def untouched() -> dict[str, np.ndarray]:
    """Volumes whose corners are of one value that is no padding."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-40, 40, (14, 96, 112))
    inside = np.where(lungs(), -850 + noise, 40)
    vessels = np.where(lungs() & (rng.random(noise.shape) < 0.03), 60, inside)
    y, x = np.mgrid[-1:1:96j, -1:1:112j]
    ring = np.where(np.abs(np.hypot(x, y) - 0.85) < 0.05, -100 + noise, inside)
    one = np.where(lungs(apart=0), np.where(rng.random(noise.shape) < 0.03, 60, -850) + noise, 40)
    saturated = np.clip(chest()[:, 24:72, 24:90], -1000, -20)
    fat = np.where(lungs(), -850 + noise, np.where(rng.random(noise.shape) < 0.5, 40, -100))
    out = {
        "constant tissue": inside,
        "with vessels": vessels,
        "ring": ring,
        "one lung": one,
        "saturated": saturated,
        "fat": fat,
    }
    out |= {f"chest {seed}": chest(seed) for seed in range(3)}
    out |= {
        f"rounded {step}": np.maximum(chest()[:, 24:72, 24:90] // step * step, -1024) for step in (4, 32, 100)
    }
    return {name: volume.astype(np.int16) for name, volume in out.items()}


@pytest.mark.parametrize("name", untouched())
def test_what_is_no_padding_stays(tmp_path: Path, name: str) -> None:
    hu = untouched()[name]
    ct = io.read_ct(save(tmp_path / "a.nii", hu, LPS))
    assert_array_equal(ct.hu, hu)


# ---- damage


@given(seed=SEEDS, name=st.sampled_from(("a.nii.gz", "packed.nrrd", "packed.mha", "packed.mhd")))
def test_damaged_compressed_voxels_are_not_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, name: str
) -> None:
    """A bit or a byte changed, a cut, bytes or a second stream behind: told, or the voxels are the same."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, 400, (5, 20, 30)).astype(np.int16)
    path = save(tmp_path_factory.mktemp("read") / name, hu, LPS)
    body = next(p for p in (path.with_suffix(".zraw"), path) if p.exists())
    whole = body.read_bytes()
    start = whole.index(b"LOCAL\n") + 6 if name.endswith(".mha") else max(0, whole.find(b"\x1f\x8b"))
    for _ in range(8):
        data = bytearray(whole)
        at = int(rng.integers(start, len(data)))
        kind = int(rng.integers(5))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data += rng.bytes(int(rng.integers(1, 40)))
        else:
            data += gzip.compress(rng.bytes(40))
        body.write_bytes(data)
        try:
            ct = io.read_ct(path)
        except ValueError as error:
            assert path.name in str(error)  # noqa: PT017
        else:  # in what a stream says of itself, such as its time
            assert kind < 2
            assert_array_equal(ct.hu, hu)


# ---- messages


def test_voxels_that_are_missing_or_short(tmp_path: Path) -> None:
    """The file, what it has and what it needs."""
    hu = chest()[:, :20, :20]
    for name in ("a.mhd", "a.nhdr"):
        path = save(tmp_path / name, hu, LPS)
        raw = next(p for p in tmp_path.iterdir() if p.suffix == ".raw")
        for keep in (0, 1, raw.stat().st_size - 1):
            raw.write_bytes(raw.read_bytes()[:keep] if keep else b"")
            told = (
                rf"{name}: truncated: .*a\.raw has {min(keep, raw.stat().st_size)} bytes of the {hu.nbytes}"
            )
            with pytest.raises(ValueError, match=told):
                io.read_ct(path)
        raw.unlink()
        with pytest.raises(
            FileNotFoundError, match=rf"{name}: .*, of {hu.nbytes} bytes .*a\.raw: no such file"
        ):
            io.read_ct(path)


def test_names_that_do_not_fit_the_data(tmp_path: Path) -> None:
    hu = chest()
    plain, packed = save(tmp_path / "a.nii", hu, LPS), save(tmp_path / "b.nii.gz", hu, LPS)
    second = tmp_path / "two.nii"
    nib.save(nib.Nifti2Image(hu.T, LPS), second)
    pair = tmp_path / "pair.hdr"
    nib.save(nib.Nifti1Pair(hu.T, LPS), pair)
    for source, name, told in (
        (packed, "c.nii", r"gzip data, whose name must end in \.nii\.gz; rename it"),
        (plain, "c.nii.gz", r"not compressed, whose name must end in \.nii; rename it"),
        (
            second,
            "c.nii",
            r"NIfTI-2 is not read; convert it to NIfTI-1, as .*from_image\(image\)\.to_filename",
        ),
        (pair, "c.nii", r"header of a pair.*convert it to one \.nii file"),
        (pair, "pair.hdr", r"pair of \.hdr and \.img .* convert it to one \.nii file"),
        (pair.with_suffix(".img"), "pair.img", r"convert it to one \.nii file"),
    ):
        path = tmp_path / name
        path.write_bytes(source.read_bytes())
        with pytest.raises(ValueError, match=told):
            io.read_ct(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.mha"])
def test_series_of_one_volume_and_of_more(tmp_path: Path, name: str) -> None:
    hu = chest()
    for count in (1, 3):
        if name == "a.nii":
            nib.save(nib.Nifti1Image(np.stack([hu.T] * count, 3), LPS), tmp_path / name)
        else:
            image = sitk.JoinSeries([image_of(hu, LPS)] * count)
            sitk.WriteImage(image, str(tmp_path / name))
        if count == 1:
            # SimpleITK does not say which way the axes of four run
            with pytest.warns(match="no space") if name == "a.nrrd" else nullcontext():
                ct = io.read_ct(tmp_path / name)
            assert_array_equal(ct.hu, hu)
            continue
        with pytest.raises(ValueError, match=r"must be 3-D .*: 3 volumes in one file"):
            io.read_ct(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_voxels_of_no_size_are_told(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, chest(), LPS)
    lines = rb"space directions: .*\n|space origin: .*\n|ElementSpacing = .*\n"
    path.write_bytes(re.sub(lines, b"", path.read_bytes()))
    with pytest.warns(UserWarning, match="taking voxels to be 1 mm long along each axis"):
        ct = io.read_ct(path)
    assert ct.spacing == (1, 1, 1)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_axes_that_run_nowhere_are_told(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, chest(), LPS)
    lines = rb"space: .*\n|TransformMatrix = .*\n|AnatomicalOrientation = .*\n"
    head = re.sub(lines, b"", path.read_bytes()).replace(b"type:", b"space dimension: 3\ntype:", 1)
    path.write_bytes(head)
    with pytest.warns(UserWarning, match="there is no (space|TransformMatrix); taking axes to run"):
        assert_array_equal(io.read_ct(path).hu, chest())


@pytest.mark.parametrize("inter", [0, np.nan])
def test_a_scale_of_nan_is_none(tmp_path: Path, inter: float) -> None:
    """As in nibabel's own headers."""
    path = save(tmp_path / "a.nii", chest(), LPS, slope=np.nan, inter=inter)
    assert_array_equal(io.read_ct(path).hu, chest())
    with pytest.raises(ValueError, match="scl_inter must be zero where scl_slope is, got -1024"):
        io.read_ct(save(path, chest(), LPS, slope=np.nan, inter=-1024))


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("process", ["", "1"])
def test_letters_that_contradict_the_matrix(
    tmp_path: Path, axes: tuple[int, ...], process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ITK writes where axes come from, others where they go; of a third, that it is not used."""
    monkeypatch.setenv(child.IN_PROCESS, process)
    for signs in itertools.product((-1, 1), repeat=3):
        path = save(tmp_path / "a.mha", chest(), LPS @ np.diag((*signs, 1.0))[[*axes, 3]])
        whole = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wanted = io.read_ct(path)
        (own,) = re.findall(rb"AnatomicalOrientation = (\w+)", whole)
        for letters in (own.translate(bytes.maketrans(b"RLAPIS", b"LRPASI")), b"???"):
            path.write_bytes(whole.replace(own, letters, 1))
            assert io.read_ct(path).warnings == ()
        path.write_bytes(whole.replace(own, own.translate(bytes.maketrans(b"RL", b"LR")), 1))
        with pytest.warns(UserWarning, match=f"run from {own.decode()}; taking TransformMatrix"):
            ct = io.read_ct(path)
        assert_array_equal(ct.hu, wanted.hu)
        assert ct.grid == wanted.grid


@pytest.mark.parametrize(("field", "value"), [("pixdim", 0.0), ("pixdim", -0.7), ("vox_offset", 100.0)])
def test_nifti_fields_by_name(tmp_path: Path, field: str, value: float) -> None:
    path = save(tmp_path / "a.nii", chest(), LPS)
    data = bytearray(path.read_bytes())
    at = {"pixdim": 84, "vox_offset": 108}[field]
    data[at : at + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{field} must be .*, got .*{value:g}"):
        io.read_ct(path)


def test_padding_of_real_volumes_is_not_made_up(shared_data: Path) -> None:
    """Volumes that saturate, that were cropped to the chest, or rounded; all of the small ones."""
    names = [*shared_data.glob("covid/*hu.nii.gz"), *shared_data.glob("healthy2/qin_lsc_00[05]*.nii.gz")]
    assert len(names) >= 4
    for path in names:
        assert io.read_ct(path).warnings == ()


@pytest.mark.parametrize("name", ["healthy2/lidc_0003", "healthy2/lungx_ct004", "covid/radiopaedia_6_hu"])
def test_padding_of_real_volumes_is_found(shared_data: Path, name: str) -> None:
    """Around the whole scan, and around a part of it that the body fills to all borders."""
    hu = io.read_ct(shared_data / f"{name}.nii.gz").hu
    hu = np.array(hu[:: max(1, len(hu) // 24), :: hu.shape[1] // 120, :: hu.shape[2] // 120])
    rng = np.random.default_rng(0)
    for scan in (hu, hu[:, 30:-25, 22:-22]):
        assert find_padding(scan) is None
        for field, inside in fields(scan.shape, rng).items():
            fill = int(rng.choice((0, 1000, 32767, -200)))
            found = find_padding(np.where(inside, scan, fill).astype(np.int16))
            assert found is not None, field
            assert found[0] == [fill]
            assert found[1][~inside].all()
            # of two voxels along the rim of so coarse a scan, those by air
            assert found[1][inside].mean() < 0.05
