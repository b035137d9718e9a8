"""Masks and truth of several labels, masks that are none, and masks on other grids than their CT's."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

from lesionsynth import cli, io, phantom  # noqa: E402
from normnet.prepare.__main__ import main as prepare  # noqa: E402

SHAPE = (5, 6, 7)
SPACING = (2.5, 0.8, 0.7)
ML = 2.5 * 0.8 * 0.7 / 1000
SEEDS = st.integers(0, 2**32 - 1)
# each example writes its files anew: what the last one left does not matter
generated = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def save(path: Path, array: np.ndarray, **image: bool) -> Path:
    written = sitk.GetImageFromArray(array, **image)
    if written.GetDimension() == 3:
        written.SetSpacing(SPACING[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(written, str(path))
    return path


def scan(folder: Path, shape: tuple[int, ...] = SHAPE) -> io.Scan:
    hu = np.random.default_rng(0).integers(-1000, 100, shape).astype(np.int16)
    return io.read_ct(save(folder / "ct.nrrd", hu))


@st.composite
def label_maps(draw: st.DrawFn) -> np.ndarray:
    """Up to five labels, small or large, in any type that holds them, some voxels of each."""
    labels = draw(st.lists(st.integers(1, 255) | st.integers(1, 30_000), min_size=1, max_size=5, unique=True))
    fits = [np.int16, np.uint16, np.int32, np.float32, np.float64] + [np.uint8] * (max(labels) < 256)
    rng = np.random.default_rng(draw(SEEDS))
    values = rng.choice([0, *labels], SHAPE)
    values.flat[: len(labels)] = labels
    return values.astype(draw(st.sampled_from(fits)))


@generated
@given(values=label_maps(), suffix=st.sampled_from(["nrrd", "nii.gz", "mha"]), data=st.data())
def test_labels_are_chosen_or_told(
    values: np.ndarray, suffix: str, data: st.DataObject, tmp_path: Path
) -> None:
    ct, path = scan(tmp_path), save(tmp_path / f"mask.{suffix}", values)
    labels = sorted({int(v) for v in np.unique(values)} - {0})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_array_equal(io.read_mask(path, ct), values > 0)
    texts = [str(one.message) for one in said]
    told = ", ".join(f"{k} ({(values == k).sum() * ML:.1f} ml)" for k in labels)
    text = f"{path}: labels {told} all count as the mask; label chooses"
    assert texts == ([text] if len(labels) > 1 else [])
    assert all(Path(one.filename) == Path(__file__) for one in said)  # the caller is shown
    chosen = data.draw(st.lists(st.sampled_from(labels), min_size=1, unique=True))
    assert_array_equal(io.read_mask(path, ct, chosen), np.isin(values, chosen))
    assert_array_equal(io.read_mask(path, ct, chosen[0]), values == chosen[0])
    gone = data.draw(st.integers(-5, 40_000).filter(lambda k: k not in labels))
    with pytest.raises(ValueError, match=rf"label must be among {re.escape(told)}, got {gone}$"):
        io.read_mask(path, ct, gone)
    with pytest.warns(UserWarning, match=rf"there is no label {gone}, only {re.escape(told)}"):
        assert_array_equal(io.read_mask(path, ct, (chosen[0], gone)), values == chosen[0])


@generated
@given(values=label_maps(), slope=st.sampled_from([0.1, 1 / 3, 0.7]))
def test_a_slope_leaves_labels_whole(values: np.ndarray, slope: float, tmp_path: Path) -> None:
    """Stored divided by the slope: float32 gives back 2.9999998 of 3."""
    ct, path = scan(tmp_path), tmp_path / "mask.nii"
    stored = (values.astype(np.float64) / np.float32(slope)).astype(np.float32)
    image = nib.Nifti1Image(stored.transpose(2, 1, 0), np.diag([-0.7, -0.8, 2.5, 1]))
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    raw[112:116] = np.float32(slope).tobytes()  # scl_slope
    raw[116:120] = np.float32(0).tobytes()
    path.write_bytes(raw)
    for label in np.unique(values[values > 0]):
        assert_array_equal(io.read_mask(path, ct, int(label)), values == label)


@generated
@given(seed=SEEDS, fraction=st.floats(0.01, 0.99), base=st.integers(0, 200), dtype=st.sampled_from("fd"))
def test_what_is_no_label_is_refused(
    seed: int, fraction: float, base: int, dtype: str, tmp_path: Path
) -> None:
    """Probabilities, and masks that were interpolated."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2, SHAPE).astype(dtype)
    values.flat[rng.integers(values.size)] = base + fraction
    ct, path = scan(tmp_path), save(tmp_path / "mask.nrrd", values)
    for label in (None, 1):
        with pytest.raises(ValueError, match=f"whole numbers, got {np.dtype(dtype).type(base + fraction):g}"):
            io.read_mask(path, ct, label)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("low", [-1024, 0, 1])
def test_an_image_is_no_mask(dtype: type, low: int, tmp_path: Path) -> None:
    shape = (3, 20, 20)
    ct = scan(tmp_path, shape)
    grey = np.random.default_rng(1).permutation(1200).reshape(shape) + low
    with pytest.raises(
        ValueError, match=f"at most 200 labels, got more, from {low} to {low + 1199}: an image"
    ):
        io.read_mask(save(tmp_path / "mask.nrrd", grey.astype(dtype)), ct)


@generated
@given(seed=SEEDS, negative=st.integers(-1024, -1))
def test_negative_labels_must_be_chosen_or_left(seed: int, negative: int, tmp_path: Path) -> None:
    values = np.random.default_rng(seed).choice(np.array([negative, 0, 1], np.int16), SHAPE)
    values.flat[:2] = (negative, 1)
    ct, path = scan(tmp_path), save(tmp_path / "mask.nrrd", values)
    with pytest.raises(
        ValueError, match=rf"labels must be above zero unless label chooses, got {negative} \("
    ):
        io.read_mask(path, ct)
    for label in (negative, 1):
        assert_array_equal(io.read_mask(path, ct, label), values == label)


@pytest.mark.parametrize("label", [None, 3, (3, 4), ()])
def test_an_empty_mask_stays_empty(label: int | tuple[int, ...] | None, tmp_path: Path) -> None:
    path = save(tmp_path / "mask.nrrd", np.zeros(SHAPE, np.uint8))
    assert not io.read_mask(path, scan(tmp_path), label).any()


@pytest.mark.parametrize("label", ["3", 3.0, True, (1, "2"), [None]])
def test_labels_are_integers(label: object, tmp_path: Path) -> None:
    path = save(tmp_path / "mask.nrrd", np.ones(SHAPE, np.uint8))
    with pytest.raises(TypeError, match="label must be an integer or several, got"):
        io.read_mask(path, scan(tmp_path), label)  # type: ignore[arg-type]


# ---- 3-D Slicer


def slicer(path: Path, layers: np.ndarray, names: dict[int, str], end: str) -> Path:
    """Write what 3-D Slicer writes: segments that overlap lie in layers, a first axis of their own."""
    axes = ["(0.7,0,0)", "(0,0.8,0)", "(0,0,2.5)"]
    several = layers.ndim == 4
    lines = [
        "NRRD0004", "type: unsigned char", f"dimension: {layers.ndim}", "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, layers.shape[::-1]))}",
        f"space directions: {' '.join(['none', *axes] if several else axes)}",
        f"kinds: {'list ' if several else ''}domain domain domain", "encoding: raw", "space origin: (0,0,0)",
    ]  # fmt: skip
    for k, (label, name) in enumerate(names.items()):
        lines += [f"Segment{k}_ID:=Segment_{k}", f"Segment{k}_LabelValue:={label}", f"Segment{k}_Layer:=0"]
        lines += [f"Segment{k}_Name:={name}", f"Segment{k}_NameAutoGenerated:=0"]
    path.write_bytes((end.join(lines) + end + end).encode() + layers.tobytes())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_segments_in_one_layer_are_labels_with_names(end: str, tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 4, SHAPE).astype(np.uint8)
    path = slicer(tmp_path / "p.seg.nrrd", values, {1: "right lung", 3: "GGO"}, end)
    ct = scan(tmp_path)
    with pytest.warns(
        UserWarning, match=r"labels 1 \(right lung, 0\.\d ml\), 2 \(0\.\d ml\), 3 \(GGO, 0\.\d ml"
    ):
        assert_array_equal(io.read_mask(path, ct), values > 0)
    assert_array_equal(io.read_mask(path, ct, 3), values == 3)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_segments_in_layers_are_refused(count: int, tmp_path: Path) -> None:
    path = slicer(tmp_path / "p.seg.nrrd", np.ones((*SHAPE, count), np.uint8), {1: "a"}, "\n")
    for read in (io.read_mask, io.read_map):
        with pytest.raises(ValueError, match=rf"one value per voxel, got {count} \(.*segments in layers"):
            read(path, scan(tmp_path))


# ---- grids


def nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), affine), path)
    return path


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Index (x, y, z) to RAS mm: any orientation, turned by up to 20 degrees about each axis."""
    rng = np.random.default_rng(draw(SEEDS))
    turn = np.eye(3)
    for axis, angle in enumerate(rng.uniform(-0.35, 0.35, 3)):
        c, s, one = np.cos(angle), np.sin(angle), np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        one[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
        turn = turn @ one
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(SPACING[::-1]) @ np.diag(rng.choice([-1, 1], 3))
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


@generated
@given(
    affine=affines(),
    order=st.permutations(range(3)),
    flips=st.tuples(*[st.booleans()] * 3),
    where=st.tuples(*[st.floats(-0.05, 0.05)] * 3),
    shear=st.floats(-1e-3, 1e-3),
)
def test_the_same_grid_in_any_orientation_fits(
    affine: np.ndarray,
    order: list[int],
    flips: tuple[bool, ...],
    where: tuple[float, ...],
    shear: float,
    tmp_path: Path,
) -> None:
    """Stored another way round, a twentieth of a voxel off along each axis, and sheared by as little."""
    ct = io.read_ct(
        nifti(tmp_path / "ct.nii", np.random.default_rng(0).integers(-999, 99, SHAPE, np.int16), affine)
    )
    values = np.random.default_rng(1).integers(0, 2, SHAPE).astype(np.uint8)
    index = np.eye(4)  # of the mask as it is stored to that of the CT
    for mine, theirs in enumerate(order):
        last = SHAPE[::-1][theirs] - 1
        index[theirs, mine] = -1 if flips[mine] else 1
        index[theirs, 3] += last if flips[mine] else 0
        index[mine, mine] *= mine == theirs
    index[:3, 3] += where
    index[0, order.index(1)] += shear  # a few 1e-3 voxels: with 0.05 of `where`, below a tenth
    stored = values.transpose(2, 1, 0)[
        tuple(slice(None, None, -1 if f else 1) for f in inverse(order, flips))
    ]
    nib.save(nib.Nifti1Image(stored.transpose(order), affine @ index), tmp_path / "mask.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that axes are sheared
        mask = io.read_mask(tmp_path / "mask.nii", ct)
        probability = io.read_map(tmp_path / "mask.nii", ct)
    assert_array_equal(mask, ct.grid.to_lps(values) > 0)
    assert_array_equal(probability, mask.astype(np.float32))


def inverse(order: list[int], flips: tuple[bool, ...]) -> list[bool]:
    """Flips of the mask's axes, in the order of the CT's."""
    return [flips[order.index(axis)] for axis in range(3)]


@generated
@given(affine=affines(), axis=st.integers(0, 2), voxels=st.floats(0.15, 3), sign=st.sampled_from([-1, 1]))
def test_another_place_is_refused_with_files_and_distance(
    affine: np.ndarray, axis: int, voxels: float, sign: int, tmp_path: Path
) -> None:
    hu = np.random.default_rng(0).integers(-999, 99, SHAPE, np.int16)
    ct = io.read_ct(nifti(tmp_path / "ct.nii", hu, affine))
    moved = affine.copy()
    moved[:3, 3] += sign * voxels * affine[:3, axis]
    path = nifti(tmp_path / "mask.nii", np.ones(SHAPE, np.uint8), moved)
    with pytest.raises(ValueError, match="must lie on the grid of") as caught:
        io.read_mask(path, ct)
    text = str(caught.value)
    assert text.startswith(f"{path}: the mask must lie on the grid of {ct.path}; ")
    told = re.search(r"corners are ([\d.]+) mm apart, at \((.*)\) against \((.*)\) \(x, y, z\)", text)
    assert told is not None
    # two decimals, and affines in float32 of 300 mm
    assert float(told[1]) == pytest.approx(np.abs(moved - affine)[:3, 3].max(), abs=0.006)
    mine, theirs = (np.array([float(v) for v in corner.split(", ")]) for corner in told.groups()[1:])
    offset = (moved - affine)[:3, 3] * (-1, -1, 1)
    np.testing.assert_allclose(mine - theirs, offset, atol=0.011)  # the same, of two numbers


@generated
@given(axis=st.integers(0, 2), more=st.sampled_from([-1, 1, 4]), what=st.sampled_from(["mask", "map"]))
def test_another_shape_is_refused(axis: int, more: int, what: str, tmp_path: Path) -> None:
    shape = tuple(n + more * (k == axis) for k, n in enumerate(SHAPE))
    ct, path = scan(tmp_path), save(tmp_path / "m.nrrd", np.ones(shape, np.uint8))
    with pytest.raises(ValueError, match=rf"{what}'s shape must be that of") as caught:
        (io.read_mask if what == "mask" else io.read_map)(path, ct)
    assert str(caught.value).endswith(f"{ct.path}, {SHAPE} (z, y, x), got {shape}")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_commands_tell_labels_in_one_line(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, with the case where there may be several; no place in the source."""
    chest = phantom.chest_ct((24, 96, 120), (5.0, 3.0, 3.0), seed)
    labels = np.random.default_rng(seed).integers(1, 9, 2, np.uint8)
    labels[1] += labels[0]
    half = np.arange(chest.lung_mask.shape[2]) < 60
    for name, array in (("p", chest.hu), ("p_lung", np.where(half, *labels) * chest.lung_mask)):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(chest.spacing[::-1])
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    ct, mask = (str(tmp_path / f"{name}.nii.gz") for name in ("p", "p_lung"))
    told = re.escape(f"{mask}: labels {min(labels)} (")
    assert cli.main(["synth", ct, "--mask", mask, "--output", str(tmp_path / "pairs")]) == 0
    assert re.search(f"^warning: {told}", err := capsys.readouterr().err, re.MULTILINE), err
    assert "UserWarning" not in err
    call = [ct, "--masks", mask, "--output", str(tmp_path / "store")]
    for _ in range(2):  # prepared, then there
        assert prepare(call) == 0
        assert re.search(f"^warning: p: {told}", err := capsys.readouterr().err, re.MULTILINE), err
