"""FRL: fair robust learning (Xu et al., arXiv 2010.06121), reweight and remargin over TRADES.

    python experiments/train.py --config=frl:mnist --workdir=runs/frl
    python experiments/evaluate.py --workdir=runs/frl

Variants: digits, mnist, fashion_mnist, cifar10, each also with _debug. Expected: mean accuracies
near TRADES' (see docs/results.md), and its worst class above TRADES' worst
(experiments/tables.py --per_class=pgd20); on digits it is not, with about 50 images a class.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

DEFENSE = dict(
    digits=dict(name="frl", steps=7, step_size=0.04, ramp_epochs=8.0),
    mnist=dict(name="frl", beta=1.0, steps=7, step_size=0.08, ramp_epochs=3.0),
    fashion_mnist=dict(name="frl", steps=7, step_size=0.025, ramp_epochs=3.0),
    cifar10=dict(name="frl", steps=10, step_size=2 / 255),
)
DEFENSE["cifar10_cpu"] = recipes.reduced(DEFENSE["cifar10"])


def get_config(variant="digits"):
    return recipes.make("frl", variant, DEFENSE)
