"""Every tolerance of the generator's tests, with its reason.

Labels, targets, the voxels outside lesions and everything compared between two runs of the same code are
compared for equality and have no entry here.
"""

from __future__ import annotations

A2_ERROR = 1e-7
"""Filtered white noise, float32 against float64, after the shift and scale of eq. 8 are taken out. The
implementation centres the noise on 0 first, so values are near 0.1 and an ulp is 7e-9; the rounding of the
taps is a common factor and goes with the scale. Measured 4e-8 over 300 random boxes and sigmas, doubled and
rounded up (`test_rescaled_noise_stays_within_the_error_the_oracle_assumes` holds it)."""

B2_ERROR = 1e-6
"""Filtered salt noise, values up to 1 with an ulp of 6e-8, and the taps' rounding. Measured 5e-7, in boxes
that are all salt; doubled."""

IMAGE = 1e-5
"""Lesion voxels: DESIGN.md section 2 wants 1e-5 of float64; it covers the rounding of β times b2."""

RANGE = 4e-7
"""A lesion's value in another range than [0, 1], relative to the range's larger end: v, a difference and a
sum in float32, half an ulp or 6e-8 each, and the ends themselves."""

HALF = 2.0**-11
"""Lesion voxels of float16, relative to the range's larger end: half an ulp."""

SURFACE = 1e-9
"""A voxel whose level (q/s)^2 is within this of 1 lies on the blob's surface to rounding, and is inside.
Undeformed spheres of radius 12 have 30 lattice points exactly on the surface; float64 rounds their levels
to 1 +- 4e-16 depending on the order of operations. Random blobs have none: levels are spread over about 0.1
per voxel, so a chance hit is 1e-8."""

BETA_RELATIVE = 1e-5
"""β recorded in a plan against the enclosure's ends: a float32 mean of up to 1e5 terms."""

KS_LEVEL = 1e-4
"""Level of each distribution test. Seeds are fixed, so it bounds the chance that a correct change of the
random layout fails a test, not flakiness: about 40 tests times 1e-4 = 0.4 %. With 2500 plans the distance
caught is 2.2 / sqrt(n): 1.1 % of the range for the 38000 blobs."""

QUATERNION_NORM = 1e-12
"""A unit quaternion made in float64: four squares and a square root."""
