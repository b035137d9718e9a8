"""Ablations: Tables IV, V and VI of the paper, as one command each.

``python -m normnet.ablate voting|modules|threshold --output FOLDER`` trains, predicts, scores, and lays the
result out as the paper prints it, with the paper's numbers beside.
"""

from normnet.ablate.config import PAPER, SCALES, SMALL, AblateConfig, Scale
from normnet.ablate.run import ablate
from normnet.ablate.tables import AblationTable

__all__ = ["PAPER", "SCALES", "SMALL", "AblateConfig", "AblationTable", "Scale", "ablate"]
