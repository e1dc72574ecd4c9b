"""What a strategy has to beat: the untouched model, one answer, linear models on its features and on words."""

from lightsft.comparison.baselines.baseline import Baseline
from lightsft.comparison.baselines.every import all_baselines

__all__ = ["Baseline", "all_baselines"]
