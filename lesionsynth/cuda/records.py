"""The one table that goes up for a batch: header, items, blobs, taps, and the initial state of every blob.

Each record is defined here once; `lesionsynth.cuda.programs` writes it out as a C struct. Axis order is
(z, y, x) throughout. A lesion (a merged component) lives in the state of its lowest-numbered blob, its root.
"""

from __future__ import annotations

import numpy as np

from lesionsynth.sampling import extended

AXES = 3
STAGES = 8
"""Passes over the lesions' boxes that have a tile list: a along x, y, z; b likewise; injection; soft edge."""

NOTHING = 2**31 - 1
"""First voxel of an empty box; its last is -1."""

STATUS = ("empty_mask", "mask_not_binary", "image_outside_range", "lattice_too_large")
"""What a rendering may find wrong, a word each in page-locked memory."""

BLOB = extended(
    ("item", np.int32),
    ("reach", np.int32, AXES),  # the box before clipping: center - reach ... center + reach
    ("to_unit", np.float64, (AXES, AXES)),  # q_j / s_j = sum_i v_i to_unit[i, j]
    ("bound", np.float64),  # of each displacement component
    ("spacing", np.float64),  # of the displacement's lattice
    ("first_task", np.int32),  # of the slices that may hold the blob
    ("radius", np.int32, (2, AXES)),  # of the Gaussians: sigma_a, sigma_b
    ("taps", np.int64, (2, AXES)),  # their first weight
    ("weights", np.int64, (2, AXES)),  # where folded matrices go, should they be longer than the box
    ("bits", np.int64),  # where the box's rows go
)
"""A blob as drawn, and what the host knows of it besides."""

STATE = np.dtype(
    [
        # the blob
        ("word", np.int32),  # first word of the box's rows, and how many
        ("words", np.int32),
        ("label", np.int32),  # of the lesion; 0: no voxel, or not the root
        ("center", np.int32, AXES),
        ("start", np.int32, AXES),  # box, clipped to the volume
        ("size", np.int32, AXES),
        ("low", np.int32, AXES),  # tight box: first and last voxel
        ("high", np.int32, AXES),
        # the lesion
        ("lesion_low", np.int32, AXES),
        ("lesion_high", np.int32, AXES),
        ("pitch", np.int32),  # row length of the field
        ("skip", np.int32),  # columns of a row before the box begins
        ("field", np.int64),  # where the field begins; -1: it found no room
        ("least", np.uint32),  # of a2 on the box, as ordered keys
        ("greatest", np.uint32),
        ("passing", np.uint64),  # voxels above the threshold, and their sum in units of 2^-26
        ("total", np.uint64),
        ("voxels", np.uint64),
        ("changed", np.uint64),  # of them, those whose value the lesion changed
    ],
    align=True,
)
"""What becomes of a blob."""

ITEM = np.dtype(
    [
        ("seed", np.uint32),
        ("sample", np.uint32),
        ("connectivity", np.int32),
        ("first_blob", np.int32),
        ("blobs", np.int32),
        ("ticket", np.uint32),
        ("mean_threshold", np.float32),  # as b2 is compared with it
        ("threshold", np.float64),  # the same, as beta's limit takes it
        ("scale", np.float64, AXES),
        ("tau", np.float64),  # as the image's values measure it, rounded to the image's type
        ("mode", np.int32),  # place in `MODES`
        ("edge", np.float32),  # width of a soft edge, in the unit of `scale`; 0: none
        ("low", np.float32),  # value that stands for 0, and how far from there the one that stands for 1 is
        ("span", np.float32),
        ("least", np.float64),  # the same two, rounded to the type of the image
        ("most", np.float64),
        ("lung_voxels", np.int64),
    ],
    align=True,
)
"""A sample of the batch."""

BATCH = np.dtype(
    [
        ("image", np.uint64),  # pointers
        ("mask", np.uint64),
        ("out", np.uint64),
        ("target", np.uint64),
        ("status", np.uint64),
        ("items", np.uint64),
        ("blobs", np.uint64),
        ("states", np.uint64),
        ("parents", np.uint64),  # union-find over blobs; points at the roots once they are joined
        ("taps", np.uint64),
        ("bits", np.uint64),  # rows of all blobs
        ("lungs", np.uint64),  # the mask, a bit a voxel
        ("rows", np.uint64),  # its voxels in each row
        ("field0", np.uint64),
        ("field1", np.uint64),
        ("weights", np.uint64),
        ("tiles", np.uint64),  # (STAGES, n_blobs + 1): first tile of each lesion
        ("image_strides", np.int64, 4),  # elements, (b, z, y, x)
        ("mask_strides", np.int64, 4),
        ("capacity", np.int64),  # floats of a field
        ("n_items", np.int32),
        ("n_blobs", np.int32),
        ("n_tasks", np.int32),
        ("depth", np.int32),
        ("height", np.int32),
        ("width", np.int32),
        ("row_words", np.int32),  # 32-bit words of a row of the mask
        ("plain", np.int32),  # 1: the slow kernels, for tests
        ("crowded", np.int32),  # lesions that found no room for their field
        ("hu_low", np.float32),
        ("hu_high", np.float32),
        ("ticket", np.uint32),  # of the last block of join_blobs
    ],
    align=True,
)
"""Header: everything a kernel needs, so that a captured graph knows no address but the table's."""
