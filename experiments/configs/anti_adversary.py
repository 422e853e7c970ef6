"""Anti-adversary steps at test time (Alfarra et al., arXiv 2103.14347).

    python experiments/train.py --config=anti_adversary:mnist --workdir=runs/anti_adversary-mnist
    python experiments/evaluate.py --workdir=runs/anti_adversary-mnist --protocol=audit

Variants: digits, mnist, cifar10, each also with _debug; the values are the paper's k = 2 and
alpha = .15. Expected: the classifier's clean accuracy, which the steps cannot change for the
worse by much, and about 0 against attacks that know of them; the audit finds the loop.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

SECTION = dict(name="anti_adversary", steps=2, step_size=0.15)
DEFENSE = dict(digits=SECTION, mnist=SECTION, cifar10=SECTION, cifar10_cpu=SECTION)
ROWS = dict(mnist=dict(train=dict(length="2e")))


def get_config(variant="digits"):
    return recipes.make(
        "anti_adversary",
        variant,
        DEFENSE,
        dict(mnist=dict(train=dict(length="2e"))),
        select="clean",
    )
