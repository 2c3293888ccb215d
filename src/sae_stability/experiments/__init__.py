"""What is asked of a study, one file an experiment; `experiment.py` says what one is.

Before them stand `texts.py` (text and activations) and `ensembles.py` (trained SAEs): what experiments are asked of.
"""

from sae_stability.experiments.experiment import Experiment, Results, Stage, experiments

__all__ = ["Experiment", "Results", "Stage", "experiments"]
