"""The coefficient for a KL budget, so that directions, layers and methods are compared at the same coefficient."""

from lensteer.calibration.budgets import Calibration, Step, calibrate, calibrate_many, starting_coefficient
from lensteer.calibration.rollouts import RolloutKL, rollout_kl

__all__ = ["Calibration", "RolloutKL", "Step", "calibrate", "calibrate_many", "rollout_kl", "starting_coefficient"]
