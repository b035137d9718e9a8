"""Label-free lesion segmentation of lung CT: train on synthetic lesions, predict on patients (NormNet)."""
