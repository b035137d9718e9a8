"""The generator of PAPER.md III-C, read downwards: plan, place, shapes, merge, pair, texture, inject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._arguments import accept_pair
from lesionsynth._backend import Backend, CpuBackend
from lesionsynth._dlpack import Restore
from lesionsynth.config import LesionConfig, check_spacing
from lesionsynth.plan import LesionPlan, Triple, check_lung_fraction, check_word
from lesionsynth.sampling import sample_plan

DTYPES = (np.float32, np.float64, np.float16, np.int16)
"""What `render` takes; int16 holds Hounsfield units."""


@dataclass(frozen=True)
class LesionPair:
    """A training pair: image with synthetic lesions, and the healthy tissue to recover.

    Arrays have the library and the shape, (z, y, x) or (b, z, y, x), of the image that went in.
    """

    image: Any
    """A, float: max(H, B) inside lesions, H elsewhere; the dtype of the input, float32 for int16."""
    target: Any
    """GT, bool: (H >= τ) & ~lesions."""
    plan: LesionPlan | tuple[LesionPlan, ...]
    """What was drawn, with the lesions it became; one per item of a batch."""
    _paint: Callable[[], Any] = field(repr=False, compare=False)

    @cached_property
    def labels(self) -> Any:
        """Merged lesions, int32: 0 background, 1..n. Painted when first asked for: training seldom does."""
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
        CPU threads; all cores, or ``NUMBA_NUM_THREADS``, where omitted. Results do not depend on it.

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

    def __init__(self, config: LesionConfig, *, seed: int = 0, threads: int | None = None) -> None:
        if not isinstance(config, LesionConfig):
            raise TypeError(f"config must be a LesionConfig, got {type(config).__name__}")
        check_word("seed", seed)
        self.config = config
        self.seed = seed
        self._backend: Backend = CpuBackend(threads)

    def __call__(
        self,
        image: Any,
        lung_mask: Any,
        *,
        index: int | Sequence[int],
        lung_fraction: float | Sequence[float] = 1.0,
        spacing: Triple | None = None,
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
            λ in (0, 1].
        spacing : (3,) floats, optional
            Voxel size (z, y, x) in mm, for configurations in mm; the configuration's where omitted.

        Returns
        -------
        LesionPair

        Raises
        ------
        TypeError, ValueError
            See `sample` and `render`.
        """
        index, lung_fraction = _plain(index), _plain(lung_fraction)
        shape = _shape_of(image)
        if shape is not None and len(shape) == 3 and not _is_scalar(index):
            raise ValueError(f"index must be one integer for a (z, y, x) image, got {index!r}")
        plan = self.sample(index=index, lung_fraction=lung_fraction, shape=shape, spacing=spacing)
        return self.render(plan, image, lung_mask)

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
        index, lung_fraction = _plain(index), _plain(lung_fraction)
        if spacing is not None:
            check_spacing(spacing)
        spacing = self.config.spacing if spacing is None else (spacing[0], spacing[1], spacing[2])
        shape = None if shape is None else tuple(int(n) for n in shape)
        if shape is not None and len(shape) not in (3, 4):
            raise ValueError(f"shape must be (z, y, x) or (b, z, y, x), got {shape}")
        batched = not _is_scalar(index) or (shape is not None and len(shape) == 4)
        if not batched:
            return self._sample_one(index, lung_fraction, shape, spacing)
        indices = _per_item("index", index, shape[0] if shape is not None and len(shape) == 4 else None)
        fractions = _per_item("lung_fraction", lung_fraction, len(indices), spread=True)
        volume = None if shape is None else shape[-3:]
        return tuple(self._sample_one(i, f, volume, spacing) for i, f in zip(indices, fractions, strict=True))

    def render(self, plan: LesionPlan | Sequence[LesionPlan], image: Any, lung_mask: Any) -> LesionPair:
        """Render a plan: the same plan, image and mask give the same pair, bit for bit.

        Parameters
        ----------
        plan : LesionPlan or sequence of LesionPlan
            One per item of a batch.
        image, lung_mask
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
            is NaN, infinite or outside [0, 1].
        """
        healthy, mask, restore = accept_pair(image, lung_mask, ranks=(3, 4), dtypes=DTYPES)
        if healthy.ndim == 3:
            if not isinstance(plan, LesionPlan):
                raise TypeError(
                    f"plan must be one LesionPlan for a (z, y, x) image, got {type(plan).__name__}"
                )
            plans = [plan]
        else:
            plans = _per_item("plan", plan, len(healthy))
            if not all(isinstance(item, LesionPlan) for item in plans):
                raise TypeError(
                    f"plan must be a sequence of LesionPlan for a (b, z, y, x) image, got {plan!r}"
                )
        dtype = np.float32 if healthy.dtype == np.int16 else healthy.dtype
        a = self._backend.output(healthy.shape, dtype)
        target = self._backend.output(healthy.shape, np.bool_)
        items = [x if healthy.ndim == 4 else x[None] for x in (healthy, mask, a, target)]
        rendered = [self._render_one(item, *arrays) for item, *arrays in zip(plans, *items, strict=True)]
        done, lesions = zip(*rendered, strict=True)
        paint = partial(_paint, self._backend, lesions, healthy.shape, restore)
        return LesionPair(restore(a), restore(target), done if healthy.ndim == 4 else done[0], paint)

    def _sample_one(self, index: Any, lung_fraction: Any, shape: Any, spacing: Triple) -> LesionPlan:
        check_word("index", index)
        check_lung_fraction(lung_fraction)
        return sample_plan(self.config, self.seed, index, float(lung_fraction), shape, spacing)

    def _render_one(
        self,
        plan: LesionPlan,
        healthy: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_],
        out: npt.NDArray[Any],
        target: npt.NDArray[np.bool_],
    ) -> tuple[LesionPlan, Any]:
        """Write one pair to `out` and `target`; returns the plan as rendered, and the lesions."""
        if plan.shape is not None and plan.shape != healthy.shape:
            raise ValueError(f"plan was drawn for a volume of shape {plan.shape}, image has {healthy.shape}")
        stages = self._backend
        finish_copy = stages.copy(healthy, plan.tau, self.config.hu_range, out, target)
        try:
            placed = stages.place(plan, mask)
            lesions = stages.merge(plan, placed, stages.draw(plan, placed))
        finally:
            finish_copy()
        components = stages.fill(plan, lesions, out, target)
        return replace(plan, components=components), lesions


def _paint(backend: Backend, lesions: Sequence[Any], shape: tuple[int, ...], restore: Restore) -> Any:
    labels = backend.output(shape, np.int32)
    for item, out in zip(lesions, labels if len(shape) == 4 else labels[None], strict=True):
        backend.paint(item, out)
    return restore(labels)


def _shape_of(image: Any) -> Sequence[int] | None:
    """Shape where the argument has one; `render` refuses what is no array."""
    shape = getattr(image, "shape", None)
    return tuple(shape) if shape is not None and len(shape) in (3, 4) else None


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Sequence) or isinstance(value, str)


def _plain(value: Any) -> Any:
    """Turn an array, such as a ``DataLoader`` collates indices into, into the Python numbers it holds."""
    if isinstance(value, Sequence):
        return [_plain(item) for item in value] if not isinstance(value, str) else value
    return value.tolist() if hasattr(value, "tolist") else value


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
