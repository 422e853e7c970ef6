"""Evaluation: bits per example, records of them, and what is printed from records."""

from jaxdefense.evaluation.robust import Evaluator, summary

__all__ = ["Evaluator", "summary"]
