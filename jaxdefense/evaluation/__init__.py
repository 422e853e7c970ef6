"""Evaluation: bits per example, AutoAttack, the audit, records, and what is printed from them."""

from jaxdefense.attacks.ensemble import Stage
from jaxdefense.evaluation.audit import Audit, Check, audit
from jaxdefense.evaluation.cascade import autoattack
from jaxdefense.evaluation.evaluator import Evaluator, summarize
from jaxdefense.evaluation.flags import Flag
from jaxdefense.evaluation.verdict import RandomVerdict, Verdict

__all__ = [
    "Audit",
    "Check",
    "Evaluator",
    "Flag",
    "RandomVerdict",
    "Stage",
    "Verdict",
    "audit",
    "autoattack",
    "summarize",
]
