"""MONAI dictionary transform: ``lesionsynth.monai.RandLesiond``.

MONAI is never imported here. Whoever composes MONAI transforms has loaded it, and the class is built on
first use from the base classes found in ``sys.modules``: `MapTransform` and `Randomizable`. The second
matters, because MONAI's caching datasets freeze every transform that is not randomizable, and frozen lesions
ruin training (PAPER.md Table V).
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from lesionsynth._dlpack import untraced
from lesionsynth.config import LesionConfig
from lesionsynth.plan import check_word
from lesionsynth.presets import covid_lung
from lesionsynth.strict import shown
from lesionsynth.synthesizer import LesionSynthesizer, plain

__all__ = ["RandLesiond"]

if TYPE_CHECKING:
    RandLesiond: Any


def __getattr__(name: str) -> Any:
    if name == "RandLesiond":
        return _rand_lesiond()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _rand_lesiond() -> type:
    transforms: Any = sys.modules.get("monai.transforms")
    utils: Any = sys.modules.get("monai.utils")
    if transforms is None or utils is None:
        raise ImportError(
            "lesionsynth.monai.RandLesiond builds on MONAI: run `import monai.transforms` first"
        )

    class RandLesiond(transforms.MapTransform, transforms.Randomizable):  # type: ignore[misc]
        r"""Inject synthetic lesions into a healthy, channel-first item; add the target and the labels.

        Parameters
        ----------
        image_key, mask_key : str
            Entries (1, z, y, x): healthy image in [0, 1], and lung mask. The image entry is replaced.
        target_key, labels_key : str
            Entries that are added: healthy tissue (bool) and merged lesions (int32), (1, z, y, x).
        config : LesionConfig, optional
            `lesionsynth.presets.covid_lung()` where omitted.
        seed : int
            Seed of the synthesizer.
        index_key : str, optional
            Entry that holds the sample index. Where omitted, each call draws one from MONAI's random state
            (`R`).
        lung_fraction_key : str, optional
            Entry that holds λ; where omitted, the mask against the paper's largest slab, as in
            `LesionSynthesizer`.
        allow_empty : bool
            Let an item without lung pass unchanged, with no lesion: a random crop must not end a night's
            training. False raises; see `lesionsynth.LesionSynthesizer`.
        spacing : (3,) floats, optional
            Voxel size in mm along the array's spatial axes, for configurations in mm.

        Notes ----- ``data["lesion_index"]`` tells the index used: `LesionSynthesizer` gives the same pair
        from it. MONAI loads NIfTI with axes (x, y, z); lengths in voxels do not care, `spacing` must follow
        the array.
        """

        def __init__(
            self,
            image_key: str = "image",
            mask_key: str = "lung_mask",
            *,
            target_key: str = "target",
            labels_key: str = "labels",
            config: LesionConfig | None = None,
            seed: int = 0,
            index_key: str | None = None,
            lung_fraction_key: str | None = None,
            spacing: tuple[float, float, float] | None = None,
            allow_empty: bool = True,
        ) -> None:
            keys = [image_key, mask_key, target_key, labels_key]
            if len({*keys, "lesion_index"}) < 5:
                raise ValueError(f"keys of entries must differ, and from 'lesion_index', got {shown(keys)}")
            super().__init__([image_key, mask_key])
            self.image_key, self.mask_key = image_key, mask_key
            self.target_key, self.labels_key = target_key, labels_key
            self.index_key, self.lung_fraction_key = index_key, lung_fraction_key
            self.spacing = spacing
            self.synthesizer = LesionSynthesizer(
                covid_lung() if config is None else config, seed=seed, allow_empty=allow_empty
            )
            self.index = 0

        def randomize(self, data: Any = None) -> None:
            """Draw the sample index from `R`."""
            self.index = int(self.R.randint(2**32, dtype="uint32"))

        @untraced
        def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
            """Return a new dictionary; the arrays of `data` are not written."""
            out = dict(data)
            image, mask = out[self.image_key], out[self.mask_key]
            shape = getattr(image, "shape", None)
            if not isinstance(shape, tuple) or len(shape) != 4 or shape[0] != 1:
                found = f"shape {tuple(shape)}" if isinstance(shape, tuple) else type(image).__name__
                raise ValueError(f"{self.image_key} must be (1, z, y, x), got {found}")
            if self.index_key is None:
                self.randomize()
            else:
                self.index = check_word(str(self.index_key), _single(out[self.index_key]))
            fraction = None
            if self.lung_fraction_key is not None:
                fraction = _single(out[self.lung_fraction_key])
                if fraction is None:
                    raise TypeError(f"lung_fraction must be a number, got {self.lung_fraction_key}=None")
            pair = self.synthesizer(
                image, mask, index=[self.index], lung_fraction=fraction, spacing=self.spacing
            )
            same = utils.convert_to_dst_type  # keeps MetaTensor and its affine
            out[self.image_key] = same(pair.image, dst=image, dtype=pair.image.dtype)[0]
            out[self.target_key] = same(pair.target, dst=image, dtype=pair.target.dtype)[0]
            out[self.labels_key] = same(pair.labels, dst=image, dtype=pair.labels.dtype)[0]
            out["lesion_index"] = self.index
            return out

    RandLesiond.__module__ = __name__
    RandLesiond.__qualname__ = "RandLesiond"
    return RandLesiond


def _single(value: Any) -> Any:
    """Return the number in an array of one, as Python's; anything else as it is."""
    found = plain(value)
    return found[0] if isinstance(found, list) and len(found) == 1 else found
