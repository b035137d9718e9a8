"""Lung segmentation on a body of simple shapes, where everything is known, and on real chests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import ndimage

from lesionsynth import io
from normnet.prepare import lungs as lungs_module
from normnet.prepare.grid import Spacing, linear
from normnet.prepare.lungs import (
    MOST_CUT,
    Lungs,
    around,
    block_mean,
    body_mask,
    check_plausible,
    largest,
    plane_dilated,
    plane_eroded,
    plane_opened,
    segment_lungs,
    settle,
    split_lungs,
    split_mask,
    voxels,
)

SPACING = (3.0, 2.0, 2.0)


@dataclass
class Body:
    """A drawn chest: HU and the truth about each part (mm coordinates from the centre, z from the bottom)."""

    spacing: tuple[float, float, float] = SPACING
    extent: tuple[float, float, float] = (300.0, 260.0, 360.0)
    hu: np.ndarray = field(init=False)
    parts: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(round(e / s) for e, s in zip(self.extent, self.spacing, strict=True))
        axes = [(np.arange(n) + 0.5) * s for n, s in zip(shape, self.spacing, strict=True)]
        self.z, self.y, self.x = np.meshgrid(axes[0], axes[1] - 120, axes[2] - 180, indexing="ij")
        rng = np.random.default_rng(0)
        hu = np.full(shape, -1000.0)
        p = self.parts = {}
        body = (self.y / 95) ** 2 + (self.x / 150) ** 2 <= 1
        hu[body] = 40
        p["right"] = self.ellipsoid((150, 0, -70), (125, 65, 48)) & (self.dome((35, 0, -70)) > 70)
        p["left"] = self.ellipsoid((150, 0, 70), (125, 65, 48)) & (self.dome((35, 0, 70)) > 70)
        lungs = p["right"] | p["left"]
        hu[lungs] = -850
        for n in range(60):  # vessels: bright rods through the lungs
            centre = rng.uniform((40, -50, -110), (270, 50, 110))
            hu[self.rod(centre, rng.normal(size=3), rng.uniform(1.0, 2.5)) & lungs] = 0 if n % 2 else -100
        p["nodule"] = self.ellipsoid((170, 10, -80), (9, 9, 9))
        # on the pleura, half a lens of 12 mm
        p["consolidation"] = self.ellipsoid((120, 48, 75), (16, 14, 14)) & p["left"]
        hu[p["nodule"] | p["consolidation"]] = 20
        p["trachea"] = (self.y - 5) ** 2 + self.x**2 <= 9**2
        p["trachea"] &= self.z > 190
        p["bronchi"] = self.tube((195, 5, 0), (150, 5, -45), 6) | self.tube((195, 5, 0), (150, 5, 45), 6)
        hu[p["trachea"] | p["bronchi"]] = -995
        p["bronchi"] &= np.abs(self.x) < 20  # in the lung they are lung
        p["stomach"] = self.ellipsoid((22, -30, 75), (16, 30, 35)) & (self.dome((35, 0, 70)) < 62)
        p["bowel"] = self.ellipsoid((15, -50, -20), (12, 18, 18)) | self.ellipsoid((12, -50, 25), (8, 10, 14))
        hu[p["stomach"] | p["bowel"]] = -990
        hu[self.rod((0, 70, 0), (1, 0, 0), 18)] = 500  # spine
        bend = self.y - 100 + 0.0008 * self.x**2
        shell = (bend > 0) & (bend < 22) & (np.abs(self.x) < 165)
        p["table"] = shell & ~body
        hu[p["table"]] = -930
        hu[shell & ((bend < 3) | (bend > 19)) & ~body] = 150
        p["outside"] = ~body
        smooth = ndimage.gaussian_filter(hu, [0.6 / s for s in self.spacing])
        self.hu = np.rint(smooth + rng.normal(0, 25, shape)).clip(-1024, 3000).astype(np.int16)

    def ellipsoid(self, centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
        parts = zip((self.z, self.y, self.x), centre, radii, strict=True)
        return np.asarray(sum(((a - c) / r) ** 2 for a, c, r in parts) <= 1)

    def dome(self, centre: tuple[float, ...]) -> np.ndarray:
        """Distance from a point below the lung: the diaphragm bulges into it."""
        z, y, x = centre
        return np.asarray(np.sqrt((self.z - z + 20) ** 2 + (self.y - y) ** 2 + (self.x - x) ** 2))

    def rod(
        self, point: np.ndarray | tuple[float, ...], way: np.ndarray | tuple[float, ...], radius: float
    ) -> np.ndarray:
        way = np.asarray(way, float) / np.linalg.norm(way)
        offset = [a - c for a, c in zip((self.z, self.y, self.x), point, strict=True)]
        along = sum(o * w for o, w in zip(offset, way, strict=True))
        return np.asarray(sum(o**2 for o in offset) - along**2 <= radius**2)

    def tube(self, start: tuple[float, ...], end: tuple[float, ...], radius: float) -> np.ndarray:
        way = np.subtract(end, start).astype(float)
        length = np.linalg.norm(way)
        along = sum(
            (a - c) * w for a, c, w in zip((self.z, self.y, self.x), start, way / length, strict=True)
        )
        return self.rod(np.array(start), way, radius) & (along >= 0) & (along <= length)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.fixture(scope="module")
def body() -> Body:
    return Body()


@pytest.fixture(scope="module")
def lungs(body: Body) -> Lungs:
    return split_lungs(body.hu, body.spacing)


def test_lungs_of_the_drawn_body(body: Body, lungs: Lungs) -> None:
    truth = body.parts["right"] | body.parts["left"]
    truth &= ~body.parts["trachea"]
    # the surface is 2 mm voxels and noise: a one-voxel rim of these lungs is 10 % of them
    assert dice(lungs.right | lungs.left, truth) > 0.96
    assert dice(lungs.right, body.parts["right"]) > 0.96
    assert dice(lungs.left, body.parts["left"]) > 0.96
    assert not (lungs.right & lungs.left).any()
    assert_array_equal(segment_lungs(body.hu, body.spacing), lungs.right | lungs.left)


@pytest.mark.parametrize("part", ["table", "outside", "stomach", "bowel", "trachea"])
def test_what_is_no_lung_stays_out(body: Body, lungs: Lungs, part: str) -> None:
    assert not ((lungs.right | lungs.left) & body.parts[part]).any()


def test_body_ends_at_the_skin(body: Body) -> None:
    found = body_mask(body.hu.astype(np.float32), body.spacing)
    assert not (found & body.parts["table"]).any()
    assert dice(found, ~body.parts["outside"]) > 0.98  # the surface moves by half a voxel of 2 mm


def test_main_bronchi_stay_out(body: Body, lungs: Lungs) -> None:
    inside_mask = ((lungs.right | lungs.left) & body.parts["bronchi"]).sum() / body.parts["bronchi"].sum()
    assert inside_mask < 0.05  # their last voxels touch the hilum


@pytest.mark.parametrize(("part", "share"), [("nodule", 1.0), ("consolidation", 0.85)])
def test_dense_lesions_stay_in(body: Body, lungs: Lungs, part: str, share: float) -> None:
    lesion = body.parts[part]
    assert ((lungs.right | lungs.left) & lesion).sum() / lesion.sum() >= share


def test_air_bridge_between_the_lungs_is_cut(body: Body) -> None:
    hu = body.hu.copy()
    bridge = (np.abs(body.y + 40) < 4) & (np.abs(body.x) < 40) & (np.abs(body.z - 160) < 30)
    hu[bridge] = -850
    lungs = split_lungs(hu, body.spacing)
    assert dice(lungs.right, body.parts["right"]) > 0.95
    assert dice(lungs.left, body.parts["left"]) > 0.95


def test_one_lung_is_named_by_its_side(body: Body) -> None:
    hu = body.hu.copy()
    hu[ndimage.binary_dilation(body.parts["left"], iterations=2)] = 40
    lungs = split_lungs(hu, body.spacing)
    assert dice(lungs.right, body.parts["right"]) > 0.95
    assert not lungs.left.any()


def test_thick_slices(body: Body) -> None:
    thick = Body(spacing=(8.0, 1.5, 1.5))
    lungs = split_lungs(thick.hu, thick.spacing)
    truth = thick.parts["right"] | thick.parts["left"]
    assert dice(lungs.right | lungs.left, truth) > 0.95
    for part in ("table", "outside", "stomach", "bowel", "trachea"):
        assert not ((lungs.right | lungs.left) & thick.parts[part]).any(), part


def test_input_is_not_written(body: Body) -> None:
    hu = body.hu.copy()
    segment_lungs(hu, body.spacing)
    assert_array_equal(hu, body.hu)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"hu must be 3-D \(z, y, x\), got shape \(4, 4\)"):
        segment_lungs(np.zeros((4, 4), np.int16), SPACING)
    with pytest.raises(ValueError, match="spacing must be three positive lengths"):
        segment_lungs(np.zeros((4, 4, 4), np.int16), (1.0, -1.0, 1.0))
    with pytest.raises(ValueError, match="no body in the volume"):
        segment_lungs(np.full((20, 40, 40), -1000, np.int16), SPACING)
    block = np.full((20, 60, 60), -1000, np.int16)
    block[:, 5:55, 5:55] = 40
    with pytest.raises(ValueError, match="no lung found: the largest air space inside the body has 0 ml"):
        segment_lungs(block, SPACING)


def test_given_mask_is_split(body: Body) -> None:
    both = body.parts["right"] | body.parts["left"]
    sides = split_mask(both, body.spacing)
    assert_array_equal(sides.right, body.parts["right"])
    assert_array_equal(sides.left, body.parts["left"])
    with pytest.raises(ValueError, match="two lungs side by side"):
        split_mask(body.parts["left"], body.spacing)


# ---- what lies outside the field of view, and images cut through the chest

COARSE = (4.0, 3.0, 3.0)
FILLS = ("constant", "noise", "ramp", "steps")
SHAPES = ("frame", "circle", "ellipse", "rotated box")


@cache
def small() -> tuple[np.ndarray, Lungs]:
    """The drawn body with arms at its sides, 360 mm in view on a coarse grid, and its lungs."""
    body = Body(COARSE)
    arms = (np.abs(body.x) > 125) & (np.abs(body.x) < 174) & (np.abs(body.y) < 50)
    body.hu[arms & body.parts["outside"]] = 40
    hu = np.pad(body.hu, [(0, 0), (16, 17), (0, 0)], constant_values=-1000)
    return hu, split_lungs(hu, COARSE)


def beyond(shape: tuple[int, ...], name: str) -> np.ndarray:
    """How far in mm each voxel of a slice lies out, by an outline's shape."""
    ny, nx = shape[1:]
    y = ((np.arange(ny) - (ny - 1) / 2) * COARSE[1])[:, None]
    x = ((np.arange(nx) - (nx - 1) / 2) * COARSE[2])[None]
    turned = 0.94 * x + 0.34 * y, 0.94 * y - 0.34 * x
    return {
        "frame": np.maximum(abs(x), abs(y)),
        "circle": np.hypot(x, y),
        "ellipse": np.hypot(x, 1.5 * y),
        "rotated box": np.maximum(abs(turned[0]), abs(turned[1])),
    }[name]


def filled(shape: tuple[int, ...], fill: str, level: float, sigma: float, out: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(round(abs(level)))
    return {
        "constant": np.full(shape, level),
        "noise": rng.normal(level, sigma, shape),
        "ramp": np.broadcast_to(np.linspace(-100, level, shape[2]), shape),
        "steps": np.broadcast_to(np.where(out > 30, level, np.where(out > 12, -50.0, 120.0)), shape),
    }[fill]


@settings(max_examples=25)
@given(
    fill=st.sampled_from(FILLS),
    name=st.sampled_from(SHAPES),
    level=st.sampled_from([0.0, 40.0, 300.0, 3071.0, 32767.0]) | st.floats(0, 3000),
    sigma=st.floats(1, 300),
    gap=st.floats(10, 60),
    blend=st.just(0.0) | st.floats(3, 12),
)
def test_padding_is_no_lung(
    fill: str,
    name: str,
    level: float,
    sigma: float,
    gap: float,
    blend: float,
) -> None:
    """Whatever fills the outside, up to 10 mm from a lung: through chest wall and arms."""
    hu, lungs = small()
    distance = beyond(hu.shape, name)
    out = distance - distance[(lungs.right | lungs.left).any(axis=0)].max() - gap - blend / 2
    weight = np.clip(out / blend + 0.5, 0, 1) if blend else out > 0
    values = hu * (1 - weight) + filled(hu.shape, fill, level, sigma, out) * weight
    found = split_lungs(np.rint(values).clip(-1024, 32767).astype(np.int16), COARSE)
    # 1 %: what the outside adds or takes at the lungs' own surface would be more
    assert found.right.sum() == pytest.approx(lungs.right.sum(), rel=0.01)
    assert found.left.sum() == pytest.approx(lungs.left.sum(), rel=0.01)


@settings(max_examples=25)
@given(
    cut=st.sampled_from(["box", "right", "left", "front", "back", "right half", "left half"]),
    place=st.floats(0, 1),
    padded=st.booleans(),
    mirrored=st.booleans(),
)
def test_cut_image_keeps_its_lungs(cut: str, place: float, padded: bool, mirrored: bool) -> None:
    """Cropped to the lungs' box, up to 40 % of them cut off at a side, or cut within 8 mm of the midline."""
    hu, lungs = small()
    right, left = lungs.right, lungs.left
    if mirrored:
        hu, right, left = (np.ascontiguousarray(a[:, :, ::-1]) for a in (hu, left, right))
    both = right | left
    (y0, y1), (x0, x1) = (np.flatnonzero(both.any(axis=a))[[0, -1]] + (0, 1) for a in ((0, 2), (0, 1)))
    gap = np.flatnonzero(right.any(axis=(0, 1)))[-1] + np.flatnonzero(left.any(axis=(0, 1)))[0]
    middle = round(gap / 2 + (place - 0.5) * 16 / COARSE[2])
    x, y = round(0.4 * place * (x1 - x0) / 2), round(0.4 * place * (y1 - y0))
    window = {
        "box": np.s_[:, y0:y1, x0:x1],
        "right": np.s_[:, :, x0 + x :],
        "left": np.s_[:, :, : x1 - x],
        "front": np.s_[:, y0 + y :],
        "back": np.s_[:, : y1 - y],
        "right half": np.s_[:, :, :middle],
        "left half": np.s_[:, :, middle:],
    }[cut]
    image = np.full_like(hu, -1024)
    image[window] = hu[window]
    found = split_lungs(image if padded else np.ascontiguousarray(hu[window]), COARSE)
    if padded:
        image[window] = 0
        assert not ((found.right | found.left) & (image == -1024)).any()
    for one, whole in ((found.right, right), (found.left, left)):
        # of both lungs: a half-seen trachea is 1 %, the rim of the other lung beyond the midline another
        expected = whole[window].sum()
        assert one.sum() == pytest.approx(expected, abs=0.025 * both[window].sum())


def test_cut_lungs_are_told() -> None:
    hu, lungs = small()
    both = lungs.right | lungs.left
    check_plausible(hu, both, COARSE, lungs.left)  # whole lungs: not a word
    front = int(np.flatnonzero(both.any(axis=(0, 2)))[0])
    share = [float(both[:, y].sum() / both[:, y:].any(axis=1).sum()) for y in range(front, hu.shape[1] // 2)]
    cut = front + next(i for i, s in enumerate(share) if s > 2 * MOST_CUT)
    with pytest.warns(UserWarning, match="the image ends within the lungs at the patient's front"):
        check_plausible(hu[:, cut:], both[:, cut:], COARSE, lungs.left[:, cut:])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "got 0 ml and 0%"),
        ("everything", "must have more than 0 and at most 12000 ml and 95% of the image, got .* 100%"),
        ("inverted", "at most 12000 ml .* air around the body, or another mask"),
    ],
)
def test_lungs_of_nobody_are_refused(kind: str, message: str) -> None:
    hu, lungs = small()
    both = lungs.right | lungs.left
    mask = {"empty": both & ~both, "everything": both | ~both, "inverted": ~both}[kind]
    with pytest.raises(ValueError, match=message):
        check_plausible(hu, mask, COARSE)


def test_unlikely_lungs_are_told() -> None:
    hu, lungs = small()
    both = lungs.right | lungs.left
    child = tuple(s / 3 for s in COARSE)
    grown = tuple(s * (10_600_000 / (both.sum() * np.prod(COARSE))) ** (1 / 3) for s in COARSE)
    with pytest.warns(UserWarning, match="the lungs have 10600 ml, more than 10500"):
        check_plausible(hu, both, grown)
    with pytest.warns(UserWarning, match=r"the right lung has \d+ ml, the left 0: is one collapsed"):
        check_plausible(hu, lungs.right, COARSE, lungs.left & ~lungs.left)
    with pytest.warns(UserWarning, match="of the lungs lie between -960 and -320 HU: are they lungs"):
        check_plausible(hu, (hu > 0) & ~both, child)
    check_plausible(hu, both, child, lungs.left)  # 1/27 of the volume is a newborn's: no warning


# ---- tools against plain definitions

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9))
spacings = st.tuples(*[st.sampled_from([0.7, 1.0, 1.3, 2.0])] * 3)
radii = st.sampled_from([0.6, 1.1, 2.3, 4.2])  # no distance between voxels: rounding decides nothing


def distances(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of every voxel to the mask; infinite where it is empty."""
    found = np.argwhere(mask) * spacing
    places = np.moveaxis(np.indices(mask.shape), 0, -1) * spacing
    every = np.linalg.norm(places[..., None, :] - found, axis=-1)
    return np.asarray(every.min(axis=-1, initial=np.inf))


@given(masks, spacings, radii)
def test_discs_reach_so_far_in_their_slice(mask: np.ndarray, spacing: Spacing, radius: float) -> None:
    near = np.stack([distances(plane, spacing[1:]) <= radius for plane in mask])
    deep = np.stack([distances(~plane, spacing[1:]) > radius for plane in mask])
    assert_array_equal(plane_dilated(mask, radius, spacing), near)
    assert_array_equal(plane_eroded(mask, radius, spacing), deep)
    opened = np.stack([distances(plane, spacing[1:]) <= radius for plane in deep])
    assert_array_equal(plane_opened(mask, radius, spacing), opened)


@given(masks, spacings, radii)
def test_closing_fills_what_no_ball_outside_reaches(
    mask: np.ndarray, spacing: Spacing, radius: float
) -> None:
    """And nothing at the border of the volume, beyond which there is more space."""
    padded = np.pad(mask, [(int(radius / s) + 2,) * 2 for s in spacing])
    closed = distances(distances(padded, spacing) > radius, spacing) > radius
    inner = tuple(slice(int(radius / s) + 2, -int(radius / s) - 2) for s in spacing)
    assert_array_equal(lungs_module._closed(mask, radius, spacing), closed[inner])


@given(masks, st.integers(0, 4))
def test_boxes(mask: np.ndarray, margin: int) -> None:
    box = around(mask, margin)
    if not mask.any():
        assert box is None
        return
    inside = np.zeros(mask.shape, bool)
    inside[box] = True
    cube = np.ones((2 * margin + 1,) * 3, bool)
    rows = [mask.any(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    spans = [np.arange(np.flatnonzero(row)[0], np.flatnonzero(row)[-1] + 1) for row in rows]
    expected = np.zeros(mask.shape, bool)
    expected[np.ix_(*spans)] = True
    assert_array_equal(inside, ndimage.binary_dilation(expected, cube))


@given(masks)
def test_components_are_counted(mask: np.ndarray) -> None:
    labels, count = ndimage.label(mask)
    sizes = [int((labels == n).sum()) for n in range(1, count + 1)]
    assert voxels(labels, count).tolist() == [0, *sizes]
    kept = largest(mask)
    assert_array_equal(kept, labels == 1 + int(np.argmax(sizes)) if count else mask)


factors = st.tuples(*[st.integers(1, 4)] * 3)


@given(
    hnp.arrays(
        np.int16, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9), elements=st.integers(-1024, 3000)
    ),
    factors,
)
def test_blocks_are_means(volume: np.ndarray, factor: tuple[int, int, int]) -> None:
    found = block_mean(volume, factor)
    assert found.dtype == np.float32
    for at in np.ndindex(found.shape):
        ends = zip(at, factor, volume.shape, strict=True)
        places = (np.arange(k * f, (k + 1) * f).clip(0, n - 1) for k, f, n in ends)
        assert found[at] == pytest.approx(volume[np.ix_(*places)].mean(dtype=float), abs=1e-3)
    assert -(-volume.shape[2] // factor[2]) == found.shape[2]


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
        elements=st.floats(-100, 100, width=32),
    ),
    st.tuples(*[st.floats(-2, 6)] * 3),
    st.tuples(*[st.floats(0.2, 3)] * 3),
)
def test_interpolation_is_scipys(
    field: np.ndarray, first: tuple[float, ...], step: tuple[float, ...]
) -> None:
    at = [f + s * np.arange(5) for f, s in zip(first, step, strict=True)]
    expected = ndimage.map_coordinates(
        field.astype(float), np.meshgrid(*at, indexing="ij"), order=1, mode="nearest"
    )
    found = linear(field, at)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)  # float32 of up to 100


def test_chunks_of_blocks() -> None:
    """A ramp's block means, interpolated, are the ramp but within half a block of the border."""
    ramp = (np.indices((150, 10, 13)) * np.array([3, -2, 1])[:, None, None, None]).sum(0).astype(np.float32)
    coarse = block_mean(ramp, (2, 2, 3))
    at = [(np.arange(n) + 0.5) / f - 0.5 for n, f in zip(ramp.shape, (2, 2, 3), strict=True)]
    whole = linear(coarse, at)
    np.testing.assert_allclose(whole[1:-1, 1:-1, 1:11], ramp[1:-1, 1:-1, 1:11], atol=1e-3)
    parts = [linear(coarse, [at[0][z : z + 32], *at[1:]]) for z in range(0, 150, 32)]
    assert_array_equal(np.concatenate(parts), whole)


@given(seed=st.integers(0, 2**16), pixel=st.sampled_from([6.0, 8.0, 12.0]), thin=st.floats(0.05, 0.4))
def test_holes_of_a_lung_are_filled(seed: int, pixel: float, thin: float) -> None:
    """What it encloses, and what it encloses within a slice up to 150 mm2, where it may be lung."""
    rng, shape = np.random.default_rng(seed), (4, 9, 10)
    air, allowed = rng.random(shape) > thin, rng.random(shape) > 0.05
    found = settle(air, allowed, (1.0, pixel, pixel), np.zeros(shape, np.float32))
    expected = ndimage.binary_fill_holes(air & allowed)
    for plane in expected:
        labels, count = ndimage.label(ndimage.binary_fill_holes(plane) & ~plane)
        for hole in (labels == n for n in range(1, count + 1)):
            if hole.sum() <= round(150 / pixel**2):
                plane |= hole
    assert_array_equal(found, expected & allowed)


@pytest.mark.parametrize("lean", [-0.7, 0.0, 0.9])
def test_a_slanted_trachea_is_followed(lean: float) -> None:
    """Slice by slice to its lower end; what is as round beside it is no trachea, nor is a short one."""
    z, y, x = np.indices((20, 30, 60))
    tube = np.hypot(y - 15, x - 30 - lean * (z - 10)) < 4.5
    tube[:5] = False
    coarse = np.where(tube | (np.hypot(y - 15, x - 55) < 4.5), -1000, 40).astype(np.float32)
    body = np.ones(coarse.shape, bool)
    assert_array_equal(lungs_module._trachea(coarse, body, (2.0, 2.0, 2.0), 30.0), tube)
    assert not lungs_module._trachea(coarse, body, (1.3, 2.0, 2.0), 30.0).any()  # 15 slices: 19.5 mm


# ---- real chests


def test_small_real_chest(shared_data: Path) -> None:
    ct = io.read_ct(shared_data / "small" / "ct-64.nrrd")
    truth = io.read_mask(shared_data / "small" / "wholeLung-64.nrrd", ct)
    # 4 mm voxels: one voxel of rim would be 20 %
    assert dice(segment_lungs(ct.hu, ct.spacing), truth) > 0.965


@pytest.mark.slow
@pytest.mark.parametrize(("number", "least"), [(4, 0.965), (6, 0.97), (7, 0.975), (8, 0.98)])
def test_covid_lungs(shared_data: Path, number: int, least: float) -> None:
    """Dice 0.976, 0.980, 0.983 and 0.990 when written; the lesions must be inside."""
    folder = shared_data / "covid"
    ct = io.read_ct(folder / f"radiopaedia_{number}_hu.nii.gz")
    truth = io.read_mask(folder / f"radiopaedia_{number}_lung.nii.gz", ct)
    lesion = io.read_mask(folder / f"radiopaedia_{number}_lesion.nii.gz", ct)
    mask = segment_lungs(ct.hu, ct.spacing)
    assert dice(mask, truth) > least
    assert (mask & lesion).sum() / lesion.sum() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "right_ml", "left_ml"),
    [
        ("healthy_acrinflt_013", 1371, 1030),
        ("healthy_cmbcrc_01068", 2487, 2009),
        ("healthy_lidc_0001", 2011, 1787),
        ("healthy_lidc_0002", 2845, 2506),
        ("healthy_lungfcp_0001", 698, 607),
        ("healthy_qin_lsc_0014", 2303, 2236),
        ("tumour_lungdx_A0001", 3237, 2357),
        ("dicom_lungdx_A0002", 1137, 1631),
    ],
)
def test_healthy_lungs(shared_data: Path, name: str, right_ml: float, left_ml: float) -> None:
    """Volumes of masks that were looked at slice by slice; a table, a stomach or a trachea would show."""
    path = shared_data / name
    ct = io.read_ct(path if path.is_dir() else shared_data / f"{name}.nii.gz")
    lungs = split_lungs(ct.hu, ct.spacing)
    ml = float(np.prod(ct.spacing)) / 1000
    # 3 %: less than the smallest stomach bubble or trachea in these scans
    assert lungs.right.sum() * ml == pytest.approx(right_ml, rel=0.03)
    assert lungs.left.sum() * ml == pytest.approx(left_ml, rel=0.03)
