"""Presets beyond the paper draw what they say: HU, sizes, numbers, places, loads in the ranges they cite."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

import lesionsynth as ls

SPACING = (2.0, 1.5, 1.5)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "presets.md"


class Organ(NamedTuple):
    """A noisy ellipsoid without anything in it, in HU or standard deviations."""

    half: tuple[float, float, float]
    """Semi-axes in mm."""
    value: float
    around: float
    noise: float


class Said(NamedTuple):
    """What a preset's docstring says."""

    organ: Organ
    values: tuple[float, float]
    """Mean of a lesion; in mode "add" of what it adds."""
    slack: float
    """The texture is scaled to the mean over a whole lesion; its inside has another, the more so the patchier
    it is. In mode "min" the noise of the organ lowers it further."""
    diameters: tuple[float, float]
    numbers: tuple[int, int]


LUNG = Organ((56, 66, 70), -860.0, 40.0, 25.0)
LIVER, KIDNEY = Organ((46, 60, 70), 116.0, -100.0, 12.0), Organ((56, 30, 34), 195.0, -100.0, 12.0)
PANCREAS = Organ((25, 22, 70), 76.0, -100.0, 12.0)
WHITE = Organ((40, 60, 50), 0.0, 1.0, 0.25)
PRESETS = {
    "ground_glass": Said(LUNG, (-670.0, -450.0), 15.0, (10.0, 50.0), (1, 26)),
    "consolidation": Said(LUNG, (-100.0, 60.0), 40.0, (10.0, 50.0), (1, 11)),
    "nodules": Said(LUNG, (-20.0, 80.0), 10.0, (3.0, 30.0), (1, 10)),
    "emphysema": Said(LUNG, (-1000.0, -950.0), 16.0, (3.0, 15.0), (1, 1024)),
    "liver_metastases": Said(LIVER, (-75.0, -30.0), 5.0, (5.0, 40.0), (1, 10)),
    "kidney_tumours": Said(KIDNEY, (40.0, 150.0), 12.0, (11.0, 80.0), (1, 2)),
    "pancreas_cysts": Said(PANCREAS, (0.0, 20.0), 7.0, (3.0, 38.0), (1, 2)),
    "brain_lesions_mr": Said(WHITE, (2.0, 4.0), 0.25, (3.0, 15.0), (5, 50)),
}
SURFACE = {
    "ground_glass": 0.85,
    "consolidation": 0.85,
    "kidney_tumours": 1.0,
    "brain_lesions_mr": 0.2,
}
"""Share of blobs that start at the organ's surface; 0 of the others."""


def scene(organ: Organ, config: ls.LesionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Image in the preset's window, and mask."""
    shape = [2 * round(h / s) + 9 for h, s in zip(organ.half, SPACING, strict=True)]
    axes = [(np.arange(n) - n // 2) * s for n, s in zip(shape, SPACING, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    mask = sum((p / h) ** 2 for p, h in zip((z, y, x), organ.half, strict=True)) < 1
    noise = gaussian_filter(np.random.default_rng(5).standard_normal(shape), 0.6)
    values = np.where(mask, organ.value, organ.around) + organ.noise * noise / noise.std()
    if config.value_range is None:
        return ls.window_hu(values, config.hu_range), mask
    return np.clip(values, *config.value_range).astype(np.float32), mask


def in_its_unit(config: ls.LesionConfig, image: np.ndarray) -> np.ndarray:
    """HU, or standard deviations."""
    low, high = config.hu_range
    return image.astype(float) * (high - low) + low if config.value_range is None else image.astype(float)


@pytest.fixture(scope="module", params=list(PRESETS))
def rendered(request):
    """A preset's name, configuration, healthy image, mask, and six pairs."""
    config = ls.presets.get(request.param)
    image, mask = scene(PRESETS[request.param].organ, config)
    synth = ls.LesionSynthesizer(config, seed=3)
    pairs = [synth(image, mask, index=k, spacing=SPACING) for k in range(6)]
    return request.param, config, image, mask, pairs


def test_every_new_preset_is_tested() -> None:
    paper = {"covid_lung", "no_shapes", "no_probability_map", "no_salt_noise", "faint", "lung_disease"}
    assert set(ls.presets.BY_NAME) == paper | set(PRESETS)
    assert set(re.findall(r"^## (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == {
        *PRESETS,
        "Sources",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_has_a_source(name) -> None:
    text = ls.presets.BY_NAME[name].__doc__
    assert text is not None
    assert re.search(r"\([^)]*\b(19|20)\d\d\b[^)]*\)", text)
    for line in re.split(r"\n    - ", text)[1:]:
        assert re.search(r"\b(19|20)\d\d\b|\bours\b", line), f"{name}: no source and not ours: {line}"


def test_lesions_stay_in_the_organ_and_change_it(rendered) -> None:
    _, config, image, mask, pairs = rendered
    for pair in pairs:
        lesions = pair.labels > 0
        assert lesions.any()
        assert not (lesions & ~mask).any()
        np.testing.assert_array_equal(pair.image[~lesions], image[~lesions])
        threshold = pair.plan.threshold
        np.testing.assert_array_equal(pair.target, (image >= np.asarray(threshold, image.dtype)) & ~lesions)
        changed = sum(c.changed for c in pair.plan.components) / lesions.sum()
        assert changed > 0.95, config.mode


def test_lesions_have_the_values_of_the_sources(rendered) -> None:
    name, config, image, _, pairs = rendered
    said = PRESETS[name]
    means = []
    for pair in pairs:
        values, labels = in_its_unit(config, pair.image), pair.labels
        if config.mode == "add":
            values = values - in_its_unit(config, image)
        depth = distance_transform_edt(labels > 0, sampling=SPACING)
        for component in pair.plan.components:
            inside = (labels == component.label) & (depth >= config.edge)  # where the edge is over
            if inside.sum() >= 40:
                means.append(values[inside].mean())
    low, high = said.values
    assert len(means) >= 2
    assert low - said.slack <= min(means), means
    assert max(means) <= high + said.slack, means


def test_sizes_and_numbers_are_drawn_in_range() -> None:
    for name, said in PRESETS.items():
        config = ls.presets.get(name)
        if config.load is not None:
            continue
        plans = ls.LesionSynthesizer(config, seed=1).sample(index=range(200), spacing=SPACING)
        numbers = [len(plan.blobs) for plan in plans]
        assert said.numbers == (min(numbers), max(numbers)), name
        diameters = 2 * np.array([b.semi_axes for plan in plans for b in plan.blobs])
        low, high = said.diameters
        assert low <= diameters.min() < 1.2 * low, name
        assert 0.8 * high < diameters.max() <= high, name
        assert all(plan.scale == SPACING for plan in plans), "lengths are in mm"


def test_shares_of_sizes_are_those_of_the_sources() -> None:
    def sizes(name: str) -> np.ndarray:
        plans = ls.LesionSynthesizer(ls.presets.get(name), seed=2).sample(index=range(600))
        return np.array([2 * np.cbrt(np.prod(b.semi_axes)) for plan in plans for b in plan.blobs])

    nodules = sizes("nodules")
    assert (nodules < 4.6).mean() == pytest.approx(0.585, abs=0.04)
    assert (nodules > 10).mean() == pytest.approx(0.17, abs=0.03)
    quartiles = np.quantile(sizes("liver_metastases"), [0.25, 0.5])
    np.testing.assert_allclose(quartiles, [10.9, 18.1], rtol=0.2)  # three semi-axes average a size
    assert (sizes("kidney_tumours") < 40).mean() == pytest.approx(0.6, abs=0.08)
    assert sizes("pancreas_cysts").mean() == pytest.approx(8.9, rel=0.12)
    assert (sizes("brain_lesions_mr") < 10.1).mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("name", "share"), [("kidney_tumours", 0.057), ("pancreas_cysts", 0.153)])
def test_second_lesions_are_as_frequent_as_published(name, share) -> None:
    plans = ls.LesionSynthesizer(ls.presets.get(name), seed=4).sample(index=range(2000))
    assert np.mean([len(plan.blobs) == 2 for plan in plans]) == pytest.approx(share, abs=0.025)


def test_emphysema_fills_the_share_that_was_drawn() -> None:
    config = ls.presets.emphysema()
    image, mask = scene(LUNG, config)
    synth = ls.LesionSynthesizer(config, seed=5)
    drawn = []
    for index in range(6):
        pair = synth(image, mask, index=index, spacing=SPACING)
        load = pair.plan.load
        assert (pair.labels > 0).sum() / mask.sum() == pytest.approx(load, rel=0.1)
        drawn.append(load)
        radii = np.array([b.semi_axes for b in pair.plan.blobs])
        # one factor of all radii, and near 1 where there are holes enough
        assert radii.max() / radii.min() <= 7.5 / 1.5
        assert radii.min() > 1.5 / 1.3
        assert radii.max() < 7.5 * 1.6
    assert 0.05 <= min(drawn) < max(drawn) <= 0.3


@pytest.mark.parametrize("name", PRESETS)
def test_lesions_lie_where_the_sources_see_them(name) -> None:
    config = ls.presets.get(name)
    image, mask = scene(PRESETS[name].organ, config)
    synth = ls.LesionSynthesizer(config, seed=6)
    plans = synth.sample(index=range(60), spacing=SPACING) if config.load is None else ()
    blobs = [blob for plan in plans for blob in plan.blobs]
    wanted = SURFACE.get(name, 0.0)
    if plans:
        assert np.mean([b.placement == "surface" for b in blobs]) == pytest.approx(wanted, abs=0.13)
    if not wanted:
        assert all(kind.placement == "uniform" for kind in config.blob_classes)
        return
    cross = np.zeros((3, 3, 3), bool)
    cross[1, 1], cross[1, :, 1] = True, True
    rim = mask & ~binary_erosion(mask, cross)
    for blob in [b for b in blobs if b.placement == "surface"][:8]:
        speck = replace(blob, semi_axes=(0.9, 0.9, 0.9), warp_amplitude=0.0, a_low=1.0, a_high=1.0)
        pair = synth.render(replace(plans[0], blobs=(speck,), shape=None), image, mask)
        lesion = pair.labels > 0
        assert lesion.sum() == 1
        assert (lesion & rim).any(), "a voxel whose neighbour in plane is outside"


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_page_run(capsys) -> None:
    """Metastases in a liver of 110 HU: five lines each, the second in a window of its own."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:32, :160, :160]
    liver = ((z - 16) / 15.0) ** 2 + ((y - 80) / 60.0) ** 2 + ((x - 80) / 65.0) ** 2 < 1
    hu = np.where(liver, 110.0, 40.0) + rng.normal(0, 15, liver.shape)
    names = {"hu": hu, "liver": liver, "spacing": (2.0, 1.0, 1.0)}
    expected = [
        ("config", (-160.0, 240.0), (30.0, 75.0), 10),
        ("mine", (-60.0, 200.0), (45.0, 55.0), 4),
    ]
    for code, told in zip(examples(), expected, strict=True):
        config, (low, high), (least, most), number = told
        assert len([line for line in code.splitlines() if line]) <= 6
        exec(compile(code, "presets.md", "exec"), names)
        assert names[config].hu_range == (low, high)
        pair, healthy = names["pair"], ls.window_hu(hu, (low, high))
        lesions = pair.labels > 0
        assert 1 <= pair.labels.max() <= number
        assert (pair.image != healthy)[lesions].mean() > 0.97
        np.testing.assert_array_equal(pair.image[~lesions], healthy[~lesions])
        core = distance_transform_edt(lesions, sampling=names["spacing"]) >= names[config].edge
        for label in range(1, int(pair.labels.max()) + 1):
            inside = core & (pair.labels == label)
            if inside.sum() < 40:
                continue
            darker = (healthy - pair.image)[inside].mean() * (high - low)
            assert least - 5 <= darker <= most + 5
            # the organ's noise stays: a lesion is as noisy as what it replaces, within its texture
            assert 0.8 < pair.image[inside].std() / healthy[inside].std() < 1.4
    assert capsys.readouterr().out.strip().isdigit()


def test_the_command_line_offers_what_is_for_ct() -> None:
    pytest.importorskip("SimpleITK")
    from lesionsynth.cli import build_parser

    command = ["synth", "--output", "out", "--preset"]
    assert build_parser().parse_args([*command, "liver_metastases"]).preset == "liver_metastases"
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "brain_lesions_mr"])


def test_a_network_is_trained_with_presets_of_its_window() -> None:
    pytest.importorskip("pydantic")
    from normnet.config import TrainConfig

    for name in ("covid_lung", "ground_glass", "consolidation", "nodules"):
        assert TrainConfig(lesions=name).lesions == name
    for name in ("emphysema", "liver_metastases", "brain_lesions_mr"):
        with pytest.raises(ValueError, match="one of covid_lung, "):
            TrainConfig(lesions=name)
