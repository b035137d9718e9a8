"""The generator of PAPER.md III-C: draw a plan, render it on the device that holds the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from lesionsynth._backend import Backends, Rendering
from lesionsynth._dlpack import check_dense, untraced
from lesionsynth._kept import kept
from lesionsynth._recipe import Recipe
from lesionsynth.config import LesionConfig, checked_spacing
from lesionsynth.plan import MOST_VOXELS, LesionPlan, Triple, check_word
from lesionsynth.sampling import is_light, sample_recipe
from lesionsynth.strict import check_integer, shown


@dataclass(frozen=True)
class LesionPair:
    """A training pair: image with synthetic lesions, and the healthy tissue to recover.

    Arrays have the library, the device and the shape, (z, y, x) or (b, z, y, x), of the image that went in.
    """

    image: Any
    """A, float: max(H, B) inside lesions, H elsewhere; the dtype of the input, float32 for int16."""
    target: Any
    """GT, bool: (H >= τ) & ~lesions."""
    _plan: Callable[[], LesionPlan | tuple[LesionPlan, ...]] = field(repr=False, compare=False)
    _paint: Callable[[], Any] = field(repr=False, compare=False)

    @kept
    @untraced
    def plan(self) -> LesionPlan | tuple[LesionPlan, ...]:
        """What was drawn, with the lesions it became; one per item of a batch.

        A GPU is waited for when this is first asked for, and what it found wrong with the input is raised.
        """  # noqa: D401  # a property
        return self._plan()

    @kept
    @untraced
    def labels(self) -> Any:
        """Merged lesions, int32: 0 background, 1..n. Painted when first asked for: training seldom does."""  # noqa: D401
        return self._paint()


class LesionSynthesizer:
    """Turn healthy slabs into training pairs, reproducibly from (seed, index).

    Parameters
    ----------
    config : LesionConfig
        What to synthesise; `lesionsynth.presets.covid_lung()` is the paper's.
    seed : int
        In [0, 2**32). Two seeds share no noise.
    threads : int, optional
        CPU threads. Where omitted, ``NUMBA_NUM_THREADS``; else one in a torch ``DataLoader`` worker; else
        ``OMP_NUM_THREADS``; else all cores. Results do not depend on it.
    allow_empty : bool
        Take an image whose mask is empty, as a random crop may be: its pair has no lesion, the image is
        unchanged and the target ``H >= τ``, and its plan has neither blobs nor components. Other items of a
        batch are what they are alone. Otherwise an empty mask is an error, since in a whole scan it is one.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or out of range.

    Examples
    --------
    >>> import lesionsynth as ls
    >>> chest = ls.phantom.chest_ct(shape=(16, 96, 96), seed=1)
    >>> image = ls.window_hu(chest.hu) * chest.lung_mask
    >>> synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
    >>> pair = synth(image, chest.lung_mask, index=17, lung_fraction=0.3)
    >>> bool((pair.image >= image).all())
    True
    """

    def __init__(
        self,
        config: LesionConfig,
        *,
        seed: int = 0,
        threads: int | None = None,
        allow_empty: bool = False,
    ) -> None:
        if not isinstance(config, LesionConfig):
            raise TypeError(f"config must be a LesionConfig, got {type(config).__name__}")
        self.config = config
        self.seed = check_word("seed", plain(seed))
        self.allow_empty = _flag(allow_empty)
        self._backends = Backends(threads)
        self._light: Any = None  # voxel and volume that the configuration was found light for

    @untraced
    def __call__(
        self,
        image: Any,
        lung_mask: Any,
        *,
        index: int | Sequence[int],
        lung_fraction: float | Sequence[float] = 1.0,
        spacing: Triple | None = None,
        out: Any = None,
        allow_empty: bool | None = None,
    ) -> LesionPair:
        """Draw and render: `sample`, then `render`.

        Parameters
        ----------
        image : (z, y, x) or (b, z, y, x) float16, float32, float64 or int16 array
            Healthy image H in [0, 1], or Hounsfield units in int16, which become H through the
            configuration's `hu_range` as in `lesionsynth.window_hu`. Any strides; NumPy or a CPU DLPack
            library. Never written.
        lung_mask : array of the same shape
            M: bool, or numbers 0 and 1.
        index : int or sequence of int
            Name of the sample; one per item of a batch.
        lung_fraction : float or sequence of float
            λ in (0, 1]; with `allow_empty` also 0, the share of a crop without lung.
        spacing : (3,) floats, optional
            Voxel size (z, y, x) in mm, for configurations in mm; the configuration's where omitted.
        out : LesionPair or (image, target), optional
            Buffers for the results, in the library and on the device of `image`, C-contiguous: an image of
            its shape and dtype (float32 for int16) and a bool target. They become the pair's arrays.
        allow_empty : bool, optional
            The synthesizer's where omitted.

        Returns
        -------
        LesionPair

        Raises
        ------
        TypeError, ValueError
            See `sample` and `render`.
        """
        index, lung_fraction = plain(index), plain(lung_fraction)
        shape = _shape_of(image)
        if shape is not None and len(shape) == 3 and not _is_scalar(index):
            raise ValueError(f"index must be one integer for a (z, y, x) image, got {shown(index)}")
        allow_empty = self.allow_empty if allow_empty is None else _flag(allow_empty)
        if allow_empty:
            lung_fraction = _at_least_a_voxel(lung_fraction)
        recipes, _ = self._draw(index, lung_fraction, shape, spacing)
        return self._render(recipes, image, lung_mask, out, allow_empty, drawn=True)

    @untraced
    def sample(
        self,
        *,
        index: int | Sequence[int],
        lung_fraction: float | Sequence[float] = 1.0,
        shape: Sequence[int] | None = None,
        spacing: Triple | None = None,
    ) -> Any:
        """Draw the random parameters of one sample, or of each item of a batch.

        Parameters
        ----------
        index, lung_fraction, spacing
            See `__call__`.
        shape : sequence of int, optional
            Shape of the image, (z, y, x) or (b, z, y, x); checked again by `render`.

        Returns
        -------
        LesionPlan or tuple of LesionPlan
            A tuple when `index` is a sequence or `shape` has a batch axis.

        Raises
        ------
        TypeError, ValueError
            An index outside [0, 2**32), λ outside (0, 1], lengths that differ from the batch, spacing <= 0.
        """
        recipes, batched = self._draw(plain(index), plain(lung_fraction), shape, spacing)
        plans = tuple(recipe.plan for recipe in recipes)
        return plans if batched else plans[0]

    def _draw(
        self, index: Any, lung_fraction: Any, shape: Sequence[int] | None, spacing: Triple | None
    ) -> tuple[list[Recipe], bool]:
        """Draw each item; also tells whether there is a batch axis."""
        spacing = self.config.spacing if spacing is None else checked_spacing(spacing)
        if shape is not None:
            sizes = plain(shape)
            if _is_scalar(sizes) or len(sizes) not in (3, 4):
                raise ValueError(f"shape must be (z, y, x) or (b, z, y, x), got {shown(shape)}")
            shape = tuple(check_integer("shape", n, 1, MOST_VOXELS, "integers >= 1") for n in sizes)
        volume = None if shape is None else (shape[-3], shape[-2], shape[-1])
        batched = not _is_scalar(index) or (shape is not None and len(shape) == 4)
        if not batched:
            return [sample_recipe(self.config, self.seed, index, lung_fraction, volume, spacing)], False
        indices = _per_item("index", index, shape[0] if shape is not None and len(shape) == 4 else None)
        fractions = _per_item("lung_fraction", lung_fraction, len(indices), spread=True)
        pairs = zip(indices, fractions, strict=True)
        return [sample_recipe(self.config, self.seed, i, f, volume, spacing) for i, f in pairs], True

    @untraced
    def render(
        self,
        plan: LesionPlan | Sequence[LesionPlan],
        image: Any,
        lung_mask: Any,
        *,
        out: Any = None,
        allow_empty: bool | None = None,
    ) -> LesionPair:
        """Render a plan: the same plan, image and mask give the same pair, bit for bit.

        Parameters
        ----------
        plan : LesionPlan or sequence of LesionPlan
            One per item of a batch.
        image, lung_mask, out, allow_empty
            See `__call__`.

        Returns
        -------
        LesionPair

        Raises
        ------
        TypeError
            `image` or `lung_mask` is no array, they belong to different libraries, or `image` has another
            dtype.
        ValueError
            Rank or shapes differ from each other or from the plan; the mask is empty or not binary; a voxel
            is NaN, infinite or outside [0, 1]; the plan's blobs are together too much work.
        """
        shape = _shape_of(image)
        if shape is not None and len(shape) == 4:
            plans = _per_item("plan", plan, shape[0])
            if not all(isinstance(item, LesionPlan) for item in plans):
                raise TypeError(
                    f"plan must be a sequence of LesionPlan for a (b, z, y, x) image, got {shown(plan)}"
                )
        elif isinstance(plan, LesionPlan):
            plans = [plan]
        else:
            raise TypeError(f"plan must be one LesionPlan for a (z, y, x) image, got {type(plan).__name__}")
        allow_empty = self.allow_empty if allow_empty is None else _flag(allow_empty)
        return self._render([Recipe.of(item) for item in plans], image, lung_mask, out, allow_empty)

    def _render(
        self,
        recipes: Sequence[Recipe],
        image: Any,
        lung_mask: Any,
        out: Any,
        allow_empty: bool,
        *,
        drawn: bool = False,
    ) -> LesionPair:
        backend = self._backends.of(image)
        inputs = backend.accept(image, lung_mask, out)
        volume = tuple(inputs.shape[-3:])
        items = inputs.shape[0] if len(inputs.shape) == 4 else 1
        if len(recipes) != items:  # of an array that told its shape otherwise
            raise ValueError(f"index must have one entry per item of the batch ({items}), got {len(recipes)}")
        for recipe in recipes:
            if recipe.shape is not None and recipe.shape != volume:
                raise ValueError(f"plan was drawn for a volume of shape {recipe.shape}, image has {volume}")
        self._check_work(recipes, volume, drawn)
        render = partial(backend.render, allow_empty=True) if allow_empty else backend.render
        rendering = render(recipes, inputs, self.config.hu_range)
        plans = partial(_plans, recipes, rendering, len(inputs.shape) == 4)
        return LesionPair(rendering.image, rendering.target, plans, rendering.labels)

    def _check_work(self, recipes: Sequence[Recipe], volume: Any, drawn: bool) -> None:
        """Refuse what would take minutes; of a configuration that never does, look at no sample."""
        key = recipes[0].scale, volume
        if drawn and (self._light == key or is_light(self.config, *key)):
            self._light = key
            return
        for recipe in recipes:
            recipe.check_work(volume)


def _plans(recipes: Sequence[Recipe], rendering: Rendering, batched: bool) -> Any:
    """Plans as rendered."""
    found = zip(recipes, rendering.components(), strict=True)
    plans = tuple(recipe.rendered(components) for recipe, components in found)
    return plans if batched else plans[0]


def _shape_of(image: Any) -> Sequence[int] | None:
    """Shape where the argument has one; `render` refuses what is no array."""
    check_dense(image, "image")  # a nested tensor would not tell
    shape = getattr(image, "shape", None)
    return shape if isinstance(shape, tuple) and len(shape) in (3, 4) and 0 not in shape else None


def _flag(value: Any) -> bool:
    """Return `allow_empty` as a bool; NumPy's is taken too."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"allow_empty must be True or False, got {shown(value)}")
    return bool(value)


def _at_least_a_voxel(fraction: Any) -> Any:
    """Take a λ of 0, or each of a batch, as one voxel of the largest volume."""
    if isinstance(fraction, list):
        return [_at_least_a_voxel(item) for item in fraction]
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    return 1 / MOST_VOXELS if number and fraction == 0 else fraction


_TEXT = (str, bytes, bytearray, memoryview)
"""Sequences that hold no numbers."""


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Sequence) or isinstance(value, _TEXT)


def plain(value: Any) -> Any:
    """Turn an array, such as a ``DataLoader`` collates indices into, into the Python numbers it holds."""
    if not _is_scalar(value):
        return [plain(item) for item in value]
    try:
        return value.tolist()
    except (AttributeError, RuntimeError):  # no array, or a tensor without values
        return value


def _per_item(name: str, value: Any, count: int | None, *, spread: bool = False) -> list[Any]:
    if _is_scalar(value) or isinstance(value, LesionPlan):
        if spread and count is not None:
            return [value] * count
        raise ValueError(
            f"{name} must have one entry per item of the batch, got a single {type(value).__name__}"
        )
    items = list(value)
    if count is not None and len(items) != count:
        raise ValueError(f"{name} must have one entry per item of the batch ({count}), got {len(items)}")
    return items
