"""Which of the steered positions matter: a chain under teacher forcing, and plans with one group left out."""

from lensteer.ablation.effects import ForcedEffect
from lensteer.ablation.forcing import ForcedChain, forced_effect
from lensteer.ablation.leaving import LeaveOneOut, leave_one_out

__all__ = ["ForcedChain", "ForcedEffect", "LeaveOneOut", "forced_effect", "leave_one_out"]
