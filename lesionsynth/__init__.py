"""Synthetic lesions for label-free lesion segmentation in lung CT (Yao et al., NormNet)."""
