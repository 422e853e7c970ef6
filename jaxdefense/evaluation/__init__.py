"""Evaluation: bits per example, AutoAttack, the audit, records, and what is printed from them."""

from jaxdefense.evaluation.audit import Audit, Check, audit
from jaxdefense.evaluation.cascade import Verdict, autoattack
from jaxdefense.evaluation.robust import Evaluator, summary

__all__ = ["Audit", "Check", "Evaluator", "Verdict", "audit", "autoattack", "summary"]
