"""Ready-made configurations: the paper's generator, the ablations of its Table V, other diseases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lesionsynth.config import BlobClass, LesionConfig, Part, Texture, Warp


def covid_lung() -> LesionConfig:
    """Return the paper's generator (PAPER.md III-C), for voxels of 0.8 x 0.8 x 1 mm."""
    return LesionConfig()


def no_shapes() -> LesionConfig:
    """Table V without shape diversity: five undeformed spheres of radius 12 in any lung."""
    spheres = BlobClass(count=(5.0, 5.0), radius=(12.0, 12.0), scale_by_lung=False, spherical=True)
    still = Warp(amplitude=(0.0, 0.0), correlation=(1.0, 1.0))
    return replace(covid_lung(), small=None, medium=spheres, large=None, warp=still)


def no_probability_map() -> LesionConfig:
    """Table V without probability maps: a(x) = 0.2 everywhere (the paper prints "2")."""
    return replace(covid_lung(), texture=Texture(a_range=(0.2, 0.2), a_min_gap=0.0))


def no_salt_noise() -> LesionConfig:
    """Table V without salt-noise diversity: σ_b = 2 and μ0 = 150/255 (the paper prints "150")."""
    grey = 150.0 / 255.0
    return replace(
        covid_lung(), texture=Texture(sigma_b_low=(2.0, 2.0), sigma_b_high=(2.0, 2.0), mu0=(grey, grey))
    )


def faint() -> LesionConfig:
    """Return the paper's generator with lesions down to -665 HU in the mean: μ0 ~ U[0.15, 0.8].

    The paper's U[0.4, 0.8] ends at -440 HU, so that fainter ground glass is never shown to a network; its
    third kind of failure (V). For a threshold T below the paper's -500 HU.
    """
    return replace(covid_lung(), texture=Texture(mu0=(0.15, 0.8)))


def lung_disease() -> LesionConfig:
    """Return a mixture for training: what lungs may hold that is not healthy, faint to solid.

    Give slabs or crops of lung in the paper's window, with λ; T is -700 HU. Each sample is of one kind.

    Notes
    -----
    Shares, sizes and numbers are ours. What sources say of each disease is said by `ground_glass`,
    `consolidation` and `nodules`, whose numbers are of whole lungs.

    - paper, 10 %: III-C as it stands.
    - faint, 25 %: the same, down to -665 HU in the mean.
    - ground glass, 25 %: a blend, with vessels to be seen through it, from -750 HU up.
    - nodules, 15 %: round, 3 to 20 mm, -300 to 60 HU.
    - masses, 8 %: 12 to 50 mm, with spicules, -100 to 60 HU.
    - part-solid, 4 %: 8 to 30 mm, haze and solid parts side by side.
    - consolidation, 6 %: dense, with dots and streaks of air in it.
    - pleura, 5 %: wedges, bands and plates that start at the pleura, -600 to 60 HU.
    - lobar, 2 %: all of a lobe's size, -600 to 60 HU.
    """
    kinds: dict[str, tuple[float, LesionConfig]] = {
        "paper": (0.1, covid_lung()),
        "faint": (0.25, faint()),
        "ground glass": (0.25, _haze()),
        "nodules": (0.15, _nodules()),
        "masses": (0.08, _masses()),
        "part-solid": (0.04, _part_solid()),
        "consolidation": (0.06, _dense()),
        "pleura": (0.05, _pleural()),
        "lobar": (0.02, _lobar()),
    }
    mixture = tuple(Part(name=name, share=share, lesions=lesions) for name, (share, lesions) in kinds.items())
    return replace(covid_lung(), hu_threshold=-700.0, mixture=mixture)


def _haze() -> LesionConfig:
    return replace(
        ground_glass(),
        small=BlobClass(count=(3.0, 10.0), radius_mm=(4.0, 12.0)),
        medium=BlobClass(count=(2.0, 8.0), radius_mm=(12.0, 30.0)),
        large=BlobClass(probability=0.5, radius_mm=(30.0, 60.0)),
        count=None,
        alpha=(0.07, 0.45),
        edge=2.0,
    )


def _nodules() -> LesionConfig:
    return replace(
        nodules(),
        small=BlobClass(count=(4.0, 16.0), radius_mm=(1.5, 4.0)),
        medium=BlobClass(count=(2.0, 10.0), radius_mm=(4.0, 10.0)),
        large=None,
        count=None,
        texture=replace(_SOLID, level_hu=(-300.0, 60.0)),
        edge=0.5,
    )


def _masses() -> LesionConfig:
    return LesionConfig(
        small=BlobClass(count=(1.0, 6.0), radius_mm=(6.0, 12.0)),
        medium=BlobClass(count=(1.0, 4.0), radius_mm=(12.0, 25.0)),
        large=None,
        warp=Warp(amplitude=(0.3, 1.4), correlation=(0.15, 0.5)),
        texture=replace(_SOLID, level_hu=(-100.0, 60.0)),
        mode="blend",
        edge=0.5,
    )


def _part_solid() -> LesionConfig:
    return LesionConfig(
        small=BlobClass(count=(2.0, 8.0), radius_mm=(4.0, 8.0)),
        medium=BlobClass(count=(1.0, 5.0), radius_mm=(8.0, 15.0)),
        large=None,
        warp=Warp(amplitude=(0.3, 1.2), correlation=(0.2, 0.6)),
        texture=Texture(
            level_hu=(-450.0, -100.0),
            a_range=(0.15, 1.0),
            a_min_gap=0.7,
            sigma_a=(2.0, 5.0),
            sigma_b_low=(0.8, 1.2),
            sigma_b_high=(1.2, 2.0),
        ),
        mode="blend",
        edge=1.0,
    )


def _dense() -> LesionConfig:
    return LesionConfig(
        small=BlobClass(count=(1.0, 6.0), radius_mm=(6.0, 15.0), placement="surface"),
        medium=BlobClass(count=(1.0, 5.0), radius_mm=(15.0, 35.0), placement="surface"),
        large=BlobClass(probability=0.3, radius_mm=(35.0, 60.0)),
        texture=_WITH_AIR,
        mode="blend",
    )


def _pleural() -> LesionConfig:
    return LesionConfig(
        small=BlobClass(count=(2.0, 10.0), radius_mm=(5.0, 15.0), placement="surface"),
        medium=BlobClass(count=(2.0, 8.0), radius_mm=(12.0, 35.0), flatness=(0.08, 0.5), placement="surface"),
        large=None,
        warp=Warp(amplitude=(0.1, 0.5)),
        texture=replace(_WITH_AIR, level_hu=(-600.0, 60.0)),
        mode="blend",
    )


def _lobar() -> LesionConfig:
    return LesionConfig(
        small=None,
        medium=None,
        large=BlobClass(count=(1.0, 3.0), radius_mm=(35.0, 80.0)),
        texture=replace(_WITH_AIR, level_hu=(-600.0, 60.0)),
        mode="blend",
    )


# --- Beyond the paper ---
# Sources stand in full in docs/presets.md. "Ours" is a choice without a published value. `radius_mm` is half
# of the diameters that sources tell.


def ground_glass() -> LesionConfig:
    """Ground glass in a lung: hazy, patchy, mostly at the pleura, with vessels to be seen through it.

    Give a whole lung in the paper's window, (-800, 100) HU; `count` is for both lungs together.

    Notes
    -----
    - HU: a blend by 0.2 to 0.42 with -150 to 0 HU, both ours, takes lung from -800 to between -670 and -450
      HU in the mean. COVID-19 lesions have their peak between -700 and -500 HU, and means of -462 ± 99 and,
      later, -430 ± 80 with consolidation (Lung involvement in COVID-19, 2020, Chin J Acad Radiol).
    - T, -700 HU: ours, the lower end of that peak.
    - Diameter, 10 to 50 mm: ours, around 25 mm, which is 4 to 7 % of lung (the same) of 4468 mL (Cheng et
      al., 2019, Int J COPD) over 26 lesions.
    - Number, 1 to 26: 712 ground-glass and 612 mixed lesions in 51 patients are 26 each (Song et al., 2020,
      Radiology); one alone in 9 of 130 (Wu et al., 2020, Eur Radiol).
    - Place: 85 % start at the surface of the lung; peripheral in 44 of 51 patients (Song et al., 2020).
    - Edge, 3 mm: ours; ill-defined in 66 of 81 patients (Shi et al., 2020, Lancet Infect Dis).
    - Patches and warps: ours.
    """
    return LesionConfig(
        small=BlobClass(count=(0.0, 12.0), radius_mm=(5.0, 12.0), placement="surface"),
        medium=BlobClass(count=(0.0, 5.0), radius_mm=(12.0, 25.0), placement="surface"),
        large=BlobClass(count=(0.0, 3.0), radius_mm=(5.0, 15.0)),
        count=(1.0, 26.0),
        texture=Texture(
            level_hu=(-150.0, 0.0),
            a_range=(0.2, 1.0),
            a_min_gap=0.5,
            sigma_a=(3.0, 8.0),
            sigma_b_low=(0.8, 1.6),
            sigma_b_high=(1.6, 3.0),
        ),
        hu_threshold=-700.0,
        mode="blend",
        alpha=(0.2, 0.42),
        edge=3.0,
    )


def consolidation() -> LesionConfig:
    """Consolidation in a lung: dense, hides its vessels, mostly at the pleura.

    Give a whole lung in the paper's window, (-800, 100) HU; `count` is for both lungs together.

    Notes
    -----
    - HU, mean of -100 to 60: the class without air, -100 to 100 HU (Gattinoni et al., 2001, Am J Respir Crit
      Care Med); its end at 60 is ours.
    - T, -300 HU: the best of eight cuts between ground glass and consolidation (Quantitative computed
      tomography for detecting COVID-19, 2021, BMC Infect Dis).
    - Diameter, 10 to 50 mm: ours, as of `ground_glass`.
    - Number, 1 to 11: 431 consolidations and 129 more with ground glass in 51 patients are 11 each (Song et
      al., 2020, Radiology).
    - Place: 85 % start at the surface; peripheral in 44 of 51 patients (Song et al., 2020).
    - Edge, 1.5 mm, texture and warps: ours.
    """
    return LesionConfig(
        small=BlobClass(count=(0.0, 9.0), radius_mm=(5.0, 12.0), placement="surface"),
        medium=BlobClass(count=(0.0, 8.0), radius_mm=(12.0, 25.0), placement="surface"),
        large=BlobClass(count=(0.0, 3.0), radius_mm=(5.0, 15.0)),
        count=(1.0, 11.0),
        texture=Texture(
            level_hu=(-100.0, 60.0),
            a_range=(0.6, 1.0),
            a_min_gap=0.2,
            sigma_a=(2.0, 6.0),
            sigma_b_low=(0.8, 1.2),
            sigma_b_high=(1.2, 2.0),
        ),
        hu_threshold=-300.0,
        mode="blend",
        edge=1.5,
    )


def nodules() -> LesionConfig:
    """Solid nodules anywhere in a lung, most of them small.

    Give a whole lung in the paper's window, (-800, 100) HU; `count` is for both lungs together.

    Notes
    -----
    - HU, mean of -20 to 80: ours, within the -100 to 200 HU that voxels of solid nodules are looked for in
      (Comparing attenuations of malignant and benign nodules, J Thorac Dis).
    - T, -400 HU: better than -160 for the solid part of a nodule (Lee et al., 2018, PLoS One).
    - Diameter, 3 to 30 mm: what counts as a nodule (Armato et al., 2011, Med Phys; LUNA16). 58 % are drawn
      below 4.6 mm and 25 % up to 10 mm, as 58.5 % of solid nodules have less than 50 mm³ and 24.7 % less than
      500 mm³ (NELSON, as tabulated in the BTS guideline, 2015, Thorax).
    - Number, 1 to 10: 2.6 in the mean of 1018 scans (Armato et al., 2011), 1 to 10 in a study group (2022,
      PLoS One); the even draw between is ours.
    - Place: anywhere, ours; a fifth lie at a fissure (NELSON), which nothing here knows of.
    - Edge, 1 mm, texture and warps: ours.
    """
    return LesionConfig(
        small=BlobClass(count=(0.0, 58.0), radius_mm=(1.5, 2.3), spherical=True),
        medium=BlobClass(count=(0.0, 25.0), radius_mm=(2.3, 5.0), spherical=True),
        large=BlobClass(count=(0.0, 17.0), radius_mm=(5.0, 15.0), spherical=True),
        count=(1.0, 10.0),
        warp=Warp(amplitude=(0.1, 0.5)),
        texture=replace(_SOLID, level_hu=(-20.0, 80.0)),
        hu_threshold=-400.0,
        mode="blend",
        edge=1.0,
    )


def emphysema() -> LesionConfig:
    """Emphysema: holes without walls that fill 5 to 30 % of a lung.

    Give a lung in a window that holds air, (-1024, 100) HU, and choose the share by `load`.

    Notes
    -----
    - HU, mean of -1000 to -950, and T, -950 HU: the one threshold of eight that agreed with the eye on cut
      lungs (Gevenois et al., 1995, Am J Respir Crit Care Med); the lower end is ours, near air's -1000.
    - Load, 0.05 to 0.3: from 5 % on it is called emphysema (Amaza et al., 2021, Int J COPD); patients reach
      67.6 % and the healthy stay below 30 % at -960 HU (Mishima et al., 1999, PNAS); the upper end is ours.
    - Diameter, 3 to 15 mm: holes begin within an acinus of 6 to 10 mm (Hansell et al., 2008, Radiology); both
      ends are ours, and small ones are most frequent since sizes follow a power law (Mishima et al., 1999).
      A factor of all radii meets `load`: in whole lungs, where `MOST_BLOBS` holes are too few, it is above 1.
    - Place: anywhere, ours. Emphysema of smokers prefers the upper lobes: give a mask of these for that.
    - Edge: none, texture and warps: ours.
    """
    return LesionConfig(
        small=BlobClass(count=(6.0, 8.0), radius_mm=(1.5, 3.0)),
        medium=BlobClass(count=(4.0, 6.0), radius_mm=(3.0, 5.0)),
        large=BlobClass(count=(1.0, 2.0), radius_mm=(5.0, 7.5)),
        load=(0.05, 0.3),
        texture=replace(_SOLID, level_hu=(-1000.0, -950.0), a_range=(0.97, 1.0), a_min_gap=0.01),
        hu_range=(-1024.0, 100.0),
        hu_threshold=-950.0,
        mode="min",
    )


def liver_metastases() -> LesionConfig:
    """Metastases in a liver on portal venous CT: darker than the liver, whose noise they keep.

    Give a whole liver in the window (-160, 240) HU.

    Notes
    -----
    - Contrast, -75 to -30 HU: ours, around the 50 HU between a liver of 116 (59.6 ± 7.5 plain, 2020, Eur J
      Radiol, and 56.2 ± 13.7 more in the portal phase, Naruo et al., 2007, Radiat Med) and tumours of 65
      (Bilic et al., 2023, Med Image Anal).
    - T, 90 HU: ours, midway between the two.
    - Window: the one most used for LiTS (Bilic et al., 2023).
    - Diameter, 5 to 40 mm: smallest 38 mm³, 4.2 mm (Bilic et al., 2023); quartiles 10.9, 18.1 and 37.7 mm,
      which the three classes follow (Bae et al., 2025, Abdom Radiol); what is larger is left out.
    - Number, 1 to 10: up to 12 in LiTS (Bilic et al., 2023); the even draw is ours.
    - Place: anywhere, ours.
    - Edge, 2 mm, texture and warps: ours. Rims, which 73 % have (2003, Ann Acad Med Singap), are not drawn.
    """
    return LesionConfig(
        small=BlobClass(count=(0.0, 1.0), radius_mm=(2.5, 5.5)),
        medium=BlobClass(count=(0.0, 1.0), radius_mm=(5.5, 9.0)),
        large=BlobClass(count=(0.0, 2.0), radius_mm=(9.0, 20.0)),
        count=(1.0, 10.0),
        warp=Warp(amplitude=(0.2, 0.7)),
        texture=replace(_SMOOTH, contrast_hu=(-75.0, -30.0)),
        hu_range=_ABDOMEN,
        hu_threshold=90.0,
        mode="add",
        edge=2.0,
    )


def kidney_tumours() -> LesionConfig:
    """Tumours of a kidney in the nephrographic phase: one, rarely two, at the surface.

    Give one kidney in the window (-160, 240) HU. What would stand out of the kidney is not drawn.

    Notes
    -----
    - HU, mean of 40 to 150: papillary cancers 41 to 95 portal and 18 to 91 nephrographic (Corwin et al.,
      2018, AJR); hypervascular ones 149 ± 34 (10.5301/uj.5000256). The kidney is at 175 to 225: plain 30 to
      50 and a rise of 145 (2007, Eur J Radiol).
    - T, 160 HU: ours, between 149 and 175.
    - Diameter, 11 to 80 mm: 11 to 201, mean 51 ± 34 (Pooler et al., 2012, AJR); the cut at 80 is ours; 60 %
      are below 40 mm, as 48 to 66 % are (Sanchez-Martin et al., 2008, Adv Urol).
    - Number: a second one in 6 %; 5.4 % are multifocal (Crispen et al., 2008, Adv Urol).
    - Window: that of `liver_metastases`, ours.
    - Place, at the surface, edge, 1 mm, texture and warps: ours.
    """
    return LesionConfig(
        small=BlobClass(count=(0.0, 6.0), radius_mm=(5.5, 20.0), placement="surface"),
        medium=BlobClass(count=(0.0, 4.0), radius_mm=(20.0, 40.0), placement="surface"),
        large=None,
        count=(1.0, 1.53),  # the half beyond 1.5 of it: 0.03 / 0.53
        warp=Warp(amplitude=(0.1, 0.5)),
        texture=Texture(
            level_hu=(40.0, 150.0),
            a_range=(0.75, 1.0),
            a_min_gap=0.1,
            sigma_a=(2.0, 5.0),
            sigma_b_low=(1.0, 1.4),
            sigma_b_high=(1.4, 2.5),
        ),
        hu_range=_ABDOMEN,
        hu_threshold=160.0,
        mode="blend",
        edge=1.0,
    )


def pancreas_cysts() -> LesionConfig:
    """Cysts of a pancreas on portal venous CT: water, round, mostly one.

    Give a whole pancreas in the window (-160, 240) HU.

    Notes
    -----
    - HU, mean of 0 to 20: 11.4 of IPMN, 13.0 of mucinous cysts, 18.9 of pseudocysts (Chalian et al., 2011,
      JOP). The pancreas is at 67.5 to 84 HU (Stuber et al., 2012, World J Radiol).
    - T, 45 HU: ours, midway between 13 and 76.
    - Diameter, 3 to 38 mm, mean 9: 2 to 38, mean 8.9, of cysts found by chance (Laffan et al., 2008, AJR);
      the lower end is ours.
    - Number: a second one in 15 %; 85 % are solitary (Laffan et al., 2008).
    - Window: that of `liver_metastases`, ours.
    - Place, anywhere, edge, 1 mm, texture and warps: ours.
    """
    return LesionConfig(
        small=BlobClass(count=(0.0, 15.0), radius_mm=(1.5, 5.0)),
        medium=BlobClass(count=(0.0, 4.0), radius_mm=(5.0, 10.0)),
        large=BlobClass(count=(0.0, 1.0), radius_mm=(10.0, 19.0)),
        count=(1.0, 1.59),  # 0.09 / 0.59
        warp=Warp(amplitude=(0.1, 0.4)),
        texture=replace(_SOLID, level_hu=(0.0, 20.0)),
        hu_range=_ABDOMEN,
        hu_threshold=45.0,
        mode="blend",
        edge=1.0,
    )


def brain_lesions_mr() -> LesionConfig:
    """White-matter lesions on T2-FLAIR in standard deviations: bright, soft, small and many.

    Give white matter as the mask, and the image with mean 0 and standard deviation 1 in the brain, clipped to
    (-4, 8). Lengths are in mm as everywhere; `hu_threshold` and `contrast_hu` are in standard deviations.

    Notes
    -----
    - Contrast, 2 to 4 standard deviations, T, 2, and the range (-4, 8): ours; no published height was found.
    - Diameter, 3 to 15 mm: from 3 mm on they count (Thompson et al., 2018, Lancet Neurol); 80 % below 10 mm,
      as 80 % have less than 80 mm² (Wang et al., 1997, J Neurol Neurosurg Psychiatry); the upper end is ours.
    - Number, 5 to 50: means of 13 subcortical ones (Pongratz et al., 2023, NeuroImage Clin), 22 and 53 in all
      (2006, Eur Radiol 16:915 and 16:1104); the even draw is ours.
    - Place: small ones anywhere, as most are subcortical; large ones at the surface of the white matter,
      which is the ventricle's or the cortex's: those at ventricles have most volume (Pongratz et al., 2023).
    - Edge, 2 mm: ours; not sharply delineated (Maillard et al., 2011, Stroke).
    - Texture and warps: ours.
    """
    return LesionConfig(
        small=BlobClass(count=(0.0, 8.0), radius_mm=(1.5, 5.0)),
        medium=BlobClass(count=(0.0, 2.0), radius_mm=(5.0, 7.5), placement="surface"),
        large=None,
        count=(5.0, 50.0),
        warp=Warp(amplitude=(0.2, 0.7)),
        texture=replace(_SMOOTH, contrast_hu=(2.0, 4.0)),
        value_range=(-4.0, 8.0),
        hu_threshold=2.0,
        mode="add",
        edge=2.0,
    )


_ABDOMEN = (-160.0, 240.0)
_SOLID = Texture(
    a_range=(0.8, 1.0),
    a_min_gap=0.05,
    sigma_a=(2.0, 5.0),
    sigma_b_low=(0.7, 1.0),
    sigma_b_high=(1.0, 1.5),
)
"""Nearly uniform and as noisy as CT, for lesions in place of the organ."""
_WITH_AIR = Texture(
    level_hu=(-200.0, 60.0),
    a_range=(0.45, 1.0),
    a_min_gap=0.3,
    sigma_a=(1.5, 5.0),
    sigma_b_low=(0.6, 1.0),
    sigma_b_high=(1.0, 1.5),
)
"""Dense, with dots and streaks that hold air: bronchi."""
_SMOOTH = Texture(
    a_range=(0.5, 1.0),
    a_min_gap=0.2,
    sigma_a=(2.0, 5.0),
    sigma_b_low=(1.5, 2.5),
    sigma_b_high=(2.5, 4.0),
)
"""Without noise of its own, for lesions that keep the organ's."""

BY_NAME: dict[str, Callable[[], LesionConfig]] = {
    "covid_lung": covid_lung,
    "no_shapes": no_shapes,
    "no_probability_map": no_probability_map,
    "no_salt_noise": no_salt_noise,
    "faint": faint,
    "lung_disease": lung_disease,
    "ground_glass": ground_glass,
    "consolidation": consolidation,
    "nodules": nodules,
    "emphysema": emphysema,
    "liver_metastases": liver_metastases,
    "kidney_tumours": kidney_tumours,
    "pancreas_cysts": pancreas_cysts,
    "brain_lesions_mr": brain_lesions_mr,
}
"""Every preset, by the name a command line uses."""


def get(name: str) -> LesionConfig:
    """Return the preset called `name`.

    Raises
    ------
    ValueError
        There is no such preset; the message lists them.
    """
    if name not in BY_NAME:
        raise ValueError(f"preset must be one of {', '.join(BY_NAME)}, got {name!r}")
    return BY_NAME[name]()
