"""The generator on NVIDIA GPUs: CuPy launches of the kernels in ``kernels/``. Nothing here imports torch.

Importing this package neither imports CuPy nor touches a device.
"""

from __future__ import annotations

__all__ = ["memory_report"]


def memory_report() -> dict[int, dict[str, int]]:
    """Tell what the generator holds on each device between batches, in bytes by purpose.

    ``field0`` and ``field1`` are the scratch fields of lesion textures: one volume for every eight items of a
    batch, and at least one. ``lungs`` and ``rows`` are the mask's bits and counts; ``weights`` the folded
    Gaussians; ``table`` what goes up for a batch, and the bits of its blobs.
    `lesionsynth.release_memory` gives all of it back. A pair has a copy of that table for its plan and
    labels, which is not counted here and is free when the pair goes.
    """
    from lesionsynth.cuda.backend import backend

    return {number: renderer.workspace.report() for number, renderer in backend().renderers.items()}
