"""CSE+AT: CSE's loss in the loop of CSA (Shen et al., arXiv 2101.12372; the loop is inferred).

    python experiments/train.py --config=cse_at:mnist_paper --workdir=runs/cse_at
    python experiments/papers/cost_sensitive.py --workdir=runs/cse_at  # the paper's own protocol
    python experiments/evaluate.py --workdir=runs/cse_at --checkpoint=last --protocol=autoattack

Variants: digits, mnist, fashion_mnist, cifar10 (protect class 0); mnist_paper,
fashion_mnist_paper, cifar10_paper (LeNet, from ADV, ten members of which member i protects class
i); each also with _debug. Expected: no number of the paper's was found; see docs/results.md.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import csa, cse, fgsm_at, recipes

_RAMP = dict(digits=8.0, mnist=3.0, fashion_mnist=3.0)


def _defense(row):
    more = dict(adversarial=True)
    if row in csa.LENGTHS:
        more.update(bounds=fgsm_at.UNCLIPPED, pretrain=csa.DEFENSE[row]["pretrain"])
    if row in _RAMP:
        more.update(ramp_epochs=_RAMP[row])
    return dict(cse.DEFENSE[row], **more)


DEFENSE = {row: _defense(row) for row in csa.DEFENSE}


def get_config(variant="digits"):
    overrides = {row: fgsm_at.paper(row, length) for row, length in csa.LENGTHS.items()}
    return recipes.make("cse_at", variant, DEFENSE, overrides)
