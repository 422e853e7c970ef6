"""Evaluation: bits per example, AutoAttack, the audit, records, and what is printed from them."""

from jaxdefense.evaluation.audit import Audit, Check, audit
from jaxdefense.evaluation.cascade import autoattack
from jaxdefense.evaluation.evaluator import Evaluator, Examples, summarize
from jaxdefense.evaluation.flags import Flag
from jaxdefense.evaluation.verdict import RandomVerdict, Stage, Verdict

__all__ = [
    "Audit",
    "Check",
    "Evaluator",
    "Examples",
    "Flag",
    "RandomVerdict",
    "Stage",
    "Verdict",
    "audit",
    "autoattack",
    "summarize",
]
