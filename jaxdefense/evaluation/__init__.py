"""Evaluation: which examples a classifier gets right, clean and under attack; what is kept of it.

* `evaluator`: any attacks, one bit per example; `cascade`: AutoAttack; `randomised`: the same of a
  model that draws numbers; `audit`: attacks of several kinds, and checks; `curves`: over eps.
* `examine` and `flags`: what makes a number doubtful. `checks`: what is refused before that.
* `journal`: how an interrupted verdict is resumed.
* `records`: what is kept, as JSON; `tables` and `report` only read records.
* `images`: adversarial images as files; `robustbench`: a record in its leaderboard's form.
* `protocols`: what `experiments/evaluate.py` does with a trained run.
"""

from jaxdefense.attacks.ensemble import Stage
from jaxdefense.evaluation.audit import Audit, Check, audit
from jaxdefense.evaluation.cascade import autoattack
from jaxdefense.evaluation.evaluator import Evaluator, Examples, summarize
from jaxdefense.evaluation.flags import Flag
from jaxdefense.evaluation.images import save_images
from jaxdefense.evaluation.verdict import RandomVerdict, Verdict

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
    "save_images",
    "summarize",
]
