"""Label-free lesion segmentation of lung CT: train on synthetic lesions, predict on patients (NormNet)."""

import lesionsynth as lesionsynth  # first: it sees to interrupts while torch is being loaded
