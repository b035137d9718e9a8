"""The generator of PAPER.md III-C: draw a plan, render it on the device that holds the image."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from lesionsynth._backend import Backend, Backends, Inputs, Rendering
from lesionsynth._dlpack import DLPackArray, check_dense, untraced
from lesionsynth._kept import kept
from lesionsynth.config import LesionConfig, checked_spacing
from lesionsynth.drawing import Request, draw_plans
from lesionsynth.plan import Component, LesionPlan, check_lung_fraction, check_word, too_much
from lesionsynth.sampling import MOST_VOXELS, Triple
from lesionsynth.strict import check_integer, shown

IDLE = 0.05
"""Share of its voxels below which a lesion changes next to nothing; of one below 20 voxels it is no voxel."""


@dataclass(frozen=True)
class LesionPair:
    """A training pair: image with synthetic lesions, and the healthy tissue to recover.

    Arrays have the library, the device and the shape, (z, y, x) or (b, z, y, x), of the image that went in.
    """

    image: Any
    """A, float: max(H, B), or what another mode makes of both, inside lesions, H elsewhere; the dtype of the
    input, float32 for int16."""
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
        self._has_load = any(part.load is not None for part in config.parts)
        self._light: Any = None  # voxel and volume that the configuration was found light for
        self._warned = False

    @untraced
    def __call__(
        self,
        image: DLPackArray,
        lung_mask: DLPackArray,
        *,
        index: int | Sequence[int] | DLPackArray,
        lung_fraction: float | Sequence[float] | DLPackArray | None = None,
        spacing: Triple | None = None,
        out: LesionPair | tuple[Any, Any] | None = None,
        allow_empty: bool | None = None,
    ) -> LesionPair:
        """Draw and render: `sample`, then `render`.

        Parameters
        ----------
        image : (z, y, x) or (b, z, y, x) float16, float32, float64 or int16 array
            Healthy image H in [0, 1], or in the configuration's `value_range`; or Hounsfield units in int16,
            which become H through `hu_range` as in `lesionsynth.window_hu`. Any strides; NumPy or a DLPack
            library. Never written.
        lung_mask : array of the same shape
            M, of the lungs or any other organ: bool, or numbers 0 and 1.
        index : int or sequence of int
            Name of the sample; one per item of a batch.
        lung_fraction : float or sequence of float, optional
            λ in (0, 1]: the organ's voxels in this slab over those of the largest slab of the data set
            (PAPER.md III-C.1); with `allow_empty` also 0, the share of a crop without lung. Where omitted,
            the largest slab is taken to hold 1.6 million voxels of the paper's, or their volume where lengths
            are in mm, so that a small patch gets few lesions; but no less than gives the sample one. The
            mask is counted for this, for which a GPU is waited for.
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
        request = self._request(index, lung_fraction, shape, spacing)
        backend = self._backends.of(image)
        inputs = backend.accept(image, lung_mask, out)
        volume, items = tuple(inputs.shape[-3:]), inputs.shape[0] if len(inputs.shape) == 4 else 1
        if len(request.indices) != items:  # of an array that told its shape otherwise
            raise ValueError(
                f"index must have one entry per item of the batch ({items}), got {len(request.indices)}"
            )
        masks = _items(backend.host_mask(lung_mask)) if self._has_load else None
        organs = backend.count_organ(inputs) if None in request.fractions else None
        plans = draw_plans(self.config, self.seed, request, organs, masks, self._backends.stages)
        return self._render(backend, plans, inputs, volume, allow_empty, drawn=True)

    @overload
    def sample(
        self,
        *,
        index: int,
        lung_fraction: float | None = None,
        shape: Sequence[int] | None = None,
        spacing: Triple | None = None,
        lung_mask: DLPackArray | None = None,
    ) -> LesionPlan: ...

    @overload
    def sample(
        self,
        *,
        index: Sequence[int] | DLPackArray,
        lung_fraction: float | Sequence[float] | DLPackArray | None = None,
        shape: Sequence[int] | None = None,
        spacing: Triple | None = None,
        lung_mask: DLPackArray | None = None,
    ) -> tuple[LesionPlan, ...]: ...

    @untraced
    def sample(
        self,
        *,
        index: int | Sequence[int] | DLPackArray,
        lung_fraction: float | Sequence[float] | DLPackArray | None = None,
        shape: Sequence[int] | None = None,
        spacing: Triple | None = None,
        lung_mask: DLPackArray | None = None,
    ) -> LesionPlan | tuple[LesionPlan, ...]:
        """Draw the random parameters of one sample, or of each item of a batch.

        Parameters
        ----------
        index, spacing
            See `__call__`.
        lung_fraction : float or sequence of float, optional
            See `__call__`; 1 where it is omitted and there is no `lung_mask` to count.
        shape : sequence of int, optional
            Shape of the image, (z, y, x) or (b, z, y, x); checked again by `render`. That of `lung_mask`
            where omitted.
        lung_mask : array, optional
            M, as in `__call__`. A configuration with a `load` needs it.

        Returns
        -------
        LesionPlan or tuple of LesionPlan
            A tuple when `index` is a sequence or `shape` has a batch axis.

        Raises
        ------
        TypeError, ValueError
            An index outside [0, 2**32), λ outside (0, 1], lengths that differ from the batch, spacing <= 0, a
            mask that is not binary or of another shape, or none where a `load` is wanted.
        """
        masks = None if lung_mask is None else self._backends.of(lung_mask).host_mask(lung_mask)
        if masks is None and self._has_load:
            raise ValueError("lung_mask must be given for a configuration with a load, got None")
        if masks is not None and shape is not None and tuple(plain(shape)) != masks.shape:
            raise ValueError(f"lung_mask must have the shape {tuple(plain(shape))}, got {masks.shape}")
        shape = shape if masks is None else masks.shape
        request = self._request(plain(index), plain(lung_fraction), shape, spacing)
        masks = None if masks is None else _items(masks)
        organs = None if masks is None else [int(np.count_nonzero(mask)) for mask in masks]
        plans = tuple(draw_plans(self.config, self.seed, request, organs, masks, self._backends.stages))
        return plans if request.batched else plans[0]

    def _request(
        self, index: Any, lung_fraction: Any, shape: Sequence[int] | None, spacing: Triple | None
    ) -> Request:
        """Check what is to be drawn."""
        spacing = self.config.spacing if spacing is None else checked_spacing(spacing)
        if shape is not None:
            sizes = plain(shape)
            if _is_scalar(sizes) or len(sizes) not in (3, 4):
                raise ValueError(f"shape must be (z, y, x) or (b, z, y, x), got {shown(shape)}")
            shape = tuple(check_integer("shape", n, 1, MOST_VOXELS, "integers >= 1") for n in sizes)
        volume = None if shape is None else (shape[-3], shape[-2], shape[-1])
        batched = not _is_scalar(index) or (shape is not None and len(shape) == 4)
        if batched:
            indices = _per_item("index", index, shape[0] if shape is not None and len(shape) == 4 else None)
            fractions = _per_item("lung_fraction", lung_fraction, len(indices), spread=True)
        else:
            indices, fractions = [index], [lung_fraction]
        for number, fraction in zip(indices, fractions, strict=True):
            check_word("index", number)
            if fraction is not None:
                check_lung_fraction(fraction)
        return Request(indices, fractions, volume, spacing, batched)

    @untraced
    def render(
        self,
        plan: LesionPlan | Sequence[LesionPlan],
        image: DLPackArray,
        lung_mask: DLPackArray,
        *,
        out: LesionPair | tuple[Any, Any] | None = None,
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
        backend = self._backends.of(image)
        inputs = backend.accept(image, lung_mask, out)
        return self._render(backend, plans, inputs, tuple(inputs.shape[-3:]), allow_empty)

    def _render(
        self,
        backend: Backend,
        plans: Sequence[LesionPlan],
        inputs: Inputs,
        volume: Any,
        allow_empty: bool,
        *,
        drawn: bool = False,
    ) -> LesionPair:
        for plan in plans:
            if plan.shape is not None and plan.shape != volume:
                raise ValueError(f"plan was drawn for a volume of shape {plan.shape}, image has {volume}")
        self._check_work(plans, volume, drawn)
        render = partial(backend.render, allow_empty=True) if allow_empty else backend.render
        rendering = render(plans, inputs, self.config.hu_range)
        tell = partial(self._rendered, plans, rendering, len(inputs.shape) == 4)
        if rendering.finished:
            self._warn_of_next_to_nothing(rendering.components())
        return LesionPair(rendering.image, rendering.target, tell, rendering.labels)

    def _check_work(self, plans: Sequence[LesionPlan], volume: Any, drawn: bool) -> None:
        """Refuse what would take minutes; of a configuration that never does, look at no sample."""
        scales = frozenset(plan.scale for plan in plans)  # one, but for a mixture in voxels and mm
        key = scales, volume
        if drawn and (
            self._light == key
            or all(_is_light(part, scale, volume) for part in self.config.parts for scale in scales)
        ):
            self._light = key
            return
        for plan in plans:
            plan.check_work(volume)

    def _rendered(self, plans: Sequence[LesionPlan], rendering: Rendering, batched: bool) -> Any:
        """Return the plans as rendered."""
        found = rendering.components()
        self._warn_of_next_to_nothing(found)
        rendered = tuple(plan.rendered(components) for plan, components in zip(plans, found, strict=True))
        return rendered if batched else rendered[0]

    def _warn_of_next_to_nothing(self, found: Sequence[tuple[Component, ...] | None]) -> None:
        """Warn, once, where most lesions of a call change next to nothing: they cannot be learned."""
        everything = (component for components in found for component in components or ())
        lesions = [component for component in everything if component.voxels * IDLE >= 1.0]
        idle = sum(c.changed is not None and c.changed < IDLE * c.voxels for c in lesions)
        if self._warned or 2 * idle <= len(lesions):
            return
        self._warned = True
        warnings.warn(
            f"{idle} of {len(lesions)} lesions change under {100 * IDLE:.0f} % of their voxels "
            "(Component.changed of pair.plan): the image is what they would be already; LesionConfig.mode "
            "and Texture.level_hu say how a lesion differs from the organ",
            stacklevel=_frames_to_caller(),
        )


def _frames_to_caller() -> int:
    """Count the frames from who asks to the first outside the package, as ``stacklevel`` counts them.

    `untraced` may have torch's compiler between the two.
    """
    frame, level = sys._getframe(1), 1
    inside = "lesionsynth.", "torch._dynamo."
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def _is_light(config: LesionConfig, scale: Triple, shape: tuple[int, int, int]) -> bool:
    """Tell whether even the most and largest lesions of a configuration can be rendered in a volume."""
    if (
        config.load is not None or config.count is not None
    ):  # their numbers and radii are not those of the classes
        return False
    kinds, warp = config.blob_classes, config.warp
    counts = [kind.most_count for kind in kinds]
    ends = [
        (kind.radii[0] * min(1.0, kind.flatness[0]), kind.radii[1] * max(1.0, kind.flatness[1]))
        for kind in kinds
    ]
    low, high = (np.repeat([end[side] for end in ends], counts) for side in (0, 1))
    sigma_b = max(config.texture.sigma_b_low[1], config.texture.sigma_b_high[1])
    sigmas = np.full((len(low), 2), (config.texture.sigma_a[1], sigma_b))
    extents = 2.0 * high * (1.0 + warp.amplitude[1])
    return not len(low) or too_much(extents, low * warp.correlation[0], sigmas, scale, shape) is None


def _items(masks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return masks if masks.ndim == 4 else masks[None]


def _shape_of(image: DLPackArray) -> Sequence[int] | None:
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
