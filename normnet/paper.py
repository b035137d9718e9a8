"""The numbers that the paper prints: its Tables II to VI, as strings where it prints mean±SD."""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = (
    "Yao, Xiao, Liu and Zhou, Label-Free Segmentation of COVID-19 Lesions in Lung CT, IEEE Transactions on "
    "Medical Imaging, 2021"
)
DATA_SETS = ("Coronacases", "Radiopedia")
"""The paper's test sets, in its spelling."""
TABLE_II: Mapping[str, tuple[str, ...]] = {
    "Coronacases": ("90.6", "78.8", "80.2", "87.8"),
    "Radiopedia": ("93.5", "70.7", "87.9", "89.5"),
}
"""Table II, by data set: precision, sensitivity, specificity, AUC in percent."""
TABLE_III: Mapping[str, tuple[str, ...]] = {
    "nnU-Net": ("80.1±6.73", "80.2±12.4", "82.3±9.30", "76.7±5.81", "77.1±14.0", "80.5±13.11"),
    "nnU-Net-Unseen": ("77.1±10.2", "81.1±11.0", "75.9±15.9", "73.9±9.45", "66.9±13.4", "85.3±9.85"),
    "AE": ("28.3±15.5", "21.5±15.3", "52.1±11.3", "30.3±17.7", "24.4±19.0", "58.9±6.2"),
    "VAE": ("26.4±14.5", "19.8±14.0", "50.1±9.8", "28.1±17.5", "21.6±17.6", "62.3±5.7"),
    "VAE Spatial": ("27.4±16.5", "21.0±16.4", "49.9±11.9", "30.7±19.8", "24.8±20.7", "59.2±8.0"),
    "VAE Original": ("10.9±8.0", "6.9±6.1", "41.3±8.2", "12.3±10.5", "8.5±8.9", "44.9±4.9"),
    "Context VAE": ("29.7±16.0", "21.8±15.6", "61.0±9.8", "32.3±21.3", "24.3±20.6", "72.2±6.0"),
    "Constrained VAE": ("27.9±14.8", "21.0±14.7", "53.2±10.5", "29.2±17.7", "22.9±18.3", "61.3±5.6"),
    "GMVAE": ("25.7±16.4", "20.2±14.4", "51.0±12.6", "28.6±17.7", "22.3±19.5", "63.3±7.2"),
    "Bayesian VAE": ("27.5±15.0", "20.8±14.7", "50.9±11.4", "29.6±16.8", "23.5±17.6", "58.2±6.8"),
    "KL Grad": ("9.5±8.2", "5.5±5.2", "65.5±19.7", "10.2±14.2", "6.7±10.3", "39.1±20.3"),
    "VAE Restoration": ("12.8±4.5", "16.3±10.1", "12.1±2.5", "9.1±3.7", "16.5±16.0", "8.8±1.6"),
    "f-AnoGAN": ("15.4±12.6", "10.8±10.8", "38.3±13.2", "19.7±17.3", "14.2±14.9", "55.2±8.9"),
    "Proposed w/o growing": ("65.5±17.9", "88.1±5.23", "56.2±21.7", "54.2±17.5", "60.8±21.2", "51.3±16.9"),
    "Proposed": ("68.7±15.8", "85.1±6.97", "62.1±22.8", "59.4±17.4", "60.4±19.7", "61.8±18.4"),
}
"""Table III, by method: DSC, PSC and SEN in percent on Coronacases, then on Radiopedia."""
ITERATIONS = (2000, 2500, 3000, 3500, 4000, 4500)
"""Columns of Table IV; the ensemble of every other table has trained for `NOMINAL`."""
NOMINAL = 3500
TABLE_IV: Mapping[str, tuple[float, ...]] = {
    "voting": (67.6, 70.2, 66.9, 68.7, 70.4, 67.4),
    "model_1": (62.1, 68.8, 67.4, 69.6, 68.8, 59.2),
    "model_2": (65.1, 64.5, 66.0, 68.0, 53.5, 66.7),
    "model_3": (66.3, 69.5, 69.1, 70.6, 68.8, 58.4),
    "model_4": (71.1, 69.9, 50.7, 64.6, 66.6, 70.4),
    "model_5": (64.2, 64.0, 66.1, 45.8, 69.8, 70.7),
}
"""Table IV, Dice in percent."""
TABLE_V: Mapping[str, tuple[str, str, str, float]] = {
    "covid_lung": ("✓", "✓", "✓", 68.7),
    "no_shapes": ("×", "✓", "✓", 51.5),
    "no_probability_map": ("✓", "×", "✓", 62.0),
    "no_salt_noise": ("✓", "✓", "×", 25.5),
}
"""Table V by preset of `lesionsynth.presets`: shapes, probability maps, salt noises, Dice in percent."""
TABLE_VI: Mapping[str, float] = {"-700": 55.1, "-600": 67.0, "-500": 68.7, "-400": 64.3, "-300": 61.1}
"""Table VI: T in HU, Dice in percent."""
