"""Read chest CT in the formats it comes in, in one orientation, and write results on the file's own grid.

NIfTI, NRRD and MetaImage files and DICOM folders all become (z, y, x) arrays of Hounsfield units in LPS
index order: z from feet to head, y from front to back, x from the patient's right to left. Reading needs
nibabel and SimpleITK (``pip install lesionsynth[io]``); importing this module does not.

Files are not trusted: headers, lengths and checksums are checked in Python. NIfTI is read with nibabel's
header and NumPy. What passes of NRRD, MetaImage and DICOM is read by SimpleITK in a process of its own, one
for all reads, so that a file which crashes it costs an error and nothing else.
``LESIONSYNTH_READ_IN_PROCESS=1`` in the environment reads in the caller's process after the same checks,
which saves the 0.3 seconds that the other takes to start (on Windows it is always so).
"""

from lesionsynth.io.dicom import SeriesInfo, largest_series, read_headers
from lesionsynth.io.find import Found, Passed, Source, dicom_folders, find_sources
from lesionsynth.io.grid import Grid
from lesionsynth.io.names import SUFFIXES, case_name
from lesionsynth.io.nifti import write_nifti
from lesionsynth.io.read import AIR_HU, Scan, list_series, read_ct, read_map, read_mask

__all__ = [
    "AIR_HU",
    "SUFFIXES",
    "Found",
    "Grid",
    "Passed",
    "Scan",
    "SeriesInfo",
    "Source",
    "case_name",
    "dicom_folders",
    "find_sources",
    "largest_series",
    "list_series",
    "read_ct",
    "read_headers",
    "read_map",
    "read_mask",
    "write_nifti",
]
