"""Erroneous edges: chest wall and mediastinum that a lung mask took in (PAPER.md III-B).

A mask a voxel too wide carries a bright rim, which the network would learn as healthy tissue. A bright
component that lies mostly along the border of the mask is such a rim; a vessel that starts there is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lesionsynth._arguments import accept_pair
from lesionsynth._dlpack import DLPACK_CUDA, DLPackArray, device_kind, untraced
from lesionsynth.cpu.edges import remove_edges
from lesionsynth.cpu.engine.threads import check_threads
from lesionsynth.cpu.label import check_connectivity
from lesionsynth.cuda.backend import check_cupy
from lesionsynth.strict import check_number, shown


@untraced
def remove_erroneous_edges(
    image: DLPackArray,
    lung_mask: DLPackArray,
    *,
    threshold: float = 1 / 3,
    contact_fraction: float = 0.5,
    shell_width: int = 2,
    connectivity: int = 26,
    threads: int | None = None,
) -> tuple[Any, Any]:
    """Take bright rims out of a lung mask, and out of the image with it.

    The connected components of ``(image >= threshold) & lung_mask`` of which more than `contact_fraction` of
    the voxels lie in the shell of the mask are the erroneous edges E; M = M' & ~E and H = H' * M (III-B).

    Parameters
    ----------
    image : (z, y, x) float32 or float64 array
        H' in [0, 1], a whole volume rather than a slab; NumPy or a DLPack library, on the CPU or on a CUDA
        device, where the work is then done. Never written.
    lung_mask : (z, y, x) array
        M': bool, or numbers 0 and 1, in the library of `image`. Never written.
    threshold : float
        τ in [0, 1], compared in the dtype of `image`; see `lesionsynth.threshold`.
    contact_fraction : float
        In [0, 1]: 0 removes whatever touches the shell, 1 nothing.
    shell_width : int
        The shell is the mask's voxels within this many steps of the outside, in plane, diagonal steps
        included. What lies beyond the image is outside. 0 removes nothing.
    connectivity : {6, 18, 26}
        Neighbourhood of the bright components.
    threads : int, optional
        CPU threads. Where omitted, ``NUMBA_NUM_THREADS``; else one in a torch ``DataLoader`` worker; else
        ``OMP_NUM_THREADS``; else all cores. Results do not depend on it.

    Returns
    -------
    image : (z, y, x) array
        H, a new array with the dtype of `image`; exactly 0 outside M.
    lung_mask : (z, y, x) bool array
        M.

    Raises
    ------
    TypeError
        `image` or `lung_mask` is no array, they belong to different libraries, or `image` is not float.
    ValueError
        Rank or shapes differ, the mask is empty or not binary, a voxel inside the mask is NaN or outside
        [0, 1], or an option is out of range. Voxels outside the mask are not looked at.
    """
    _check_options(threshold, contact_fraction, shell_width)
    check_connectivity(connectivity)
    check_threads(threads)
    if device_kind(image) == DLPACK_CUDA:
        check_cupy("image and lung_mask are on a CUDA device")
        from lesionsynth.cuda import ops as cuda_ops

        options = threshold, contact_fraction, int(shell_width), connectivity
        return cuda_ops.remove_erroneous_edges(image, lung_mask, *options)
    healthy, mask, restore = accept_pair(image, lung_mask, ranks=(3,), dtypes=("float32", "float64"))
    level = healthy.dtype.type(threshold)
    kept, lungs = remove_edges(healthy, mask, level, contact_fraction, shell_width, connectivity, threads)
    return restore(kept), restore(lungs)


def _check_options(threshold: Any, contact_fraction: Any, shell_width: Any) -> None:
    for name, value in (("threshold", threshold), ("contact_fraction", contact_fraction)):
        check_number(name, value, 0.0, 1.0)
    if isinstance(shell_width, bool) or not isinstance(shell_width, int | np.integer) or shell_width < 0:
        raise ValueError(f"shell_width must be an integer >= 0, got {shown(shell_width)}")
