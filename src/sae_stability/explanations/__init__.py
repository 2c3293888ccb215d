"""What a feature fires on, said in words and scored on contexts that were not shown (detection, as delphi does).

    windows          the contexts that are shown and those that explanations are scored on
    rules            a deterministic engine: a rule of the surface of the text
    language_model   an engine behind any OpenAI-compatible endpoint
    local_model      an engine on this machine, from a chat model's files
    asking           what both are asked
    answers          what endpoints answer, in whatever form
    scoring          precision, recall and F1
    surface          whether an explanation is of surface form
    agreement        how well that agrees with labels

No engine is told the band of a feature.
"""

from sae_stability.explanations.agreement import Agreement, agreement
from sae_stability.explanations.asking import explain_messages
from sae_stability.explanations.language_model import BudgetSpent, LanguageModel
from sae_stability.explanations.local_model import LocalModel
from sae_stability.explanations.rules import Rules
from sae_stability.explanations.scoring import Engine, Explanation, explain
from sae_stability.explanations.surface import says_surface
from sae_stability.explanations.windows import Task, Window, tasks

__all__ = [
    "Agreement",
    "BudgetSpent",
    "Engine",
    "Explanation",
    "LanguageModel",
    "LocalModel",
    "Rules",
    "Task",
    "Window",
    "agreement",
    "explain",
    "explain_messages",
    "says_surface",
    "tasks",
]
