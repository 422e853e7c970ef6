"""ADD, distillation from a robust teacher's soft labels (X. W. Zhang 2023), in RSLAD's form.

    python experiments/train.py --config=trades:cifar10 --workdir=runs/trades-cifar10
    python experiments/train.py --config=add:cifar10 --workdir=runs/add-cifar10
    python experiments/evaluate.py --workdir=runs/add-cifar10
    python experiments/evaluate.py --workdir=runs/add-cifar10 --protocol=autoattack

Variants: digits, mnist, cifar10, cifar100, cifar10_paper, cifar10_paper_mobilenet, cifar100_paper,
cifar100_paper_mobilenet and the paper rows' teachers cifar10_teacher, cifar100_teacher (WRN-34-10
by TRADES), each also with _debug. On digits the run trains its own teacher first; elsewhere the
teacher is another run's classifier: its config is in `TEACHERS`, its workdir is changed by
--config.defense.teacher.workdir=... The students are light: a quarter of the MNIST network,
MobileNetV2. ATTACK, TEACHERS, STUDENTS and papers() are those of the rivals too: ard, iad, adaad.

Expected: the thesis' numbers are not known (only its abstract could be read), and RSLAD's are not
repeated here from memory. The teacher of the paper rows, as others trained it: 84.92 clean, 56.61
under PGD-20, 53.08 under AutoAttack on CIFAR-10. `cifar10` and `cifar100` have 30 epochs and a
ResNet-18 teacher, and are ours.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

_CIFAR = dict(steps=10, step_size=2 / 255, ramp_epochs=0.0)
ATTACK = dict(
    digits=dict(steps=7, step_size=0.04),
    mnist=dict(steps=7, step_size=0.08, ramp_epochs=3.0),
    cifar10=_CIFAR,
    cifar10_cpu=dict(_CIFAR, **recipes.REDUCED_ATTACK),
    cifar100=_CIFAR,
    cifar10_paper=_CIFAR,
    cifar10_paper_mobilenet=_CIFAR,
    cifar100_paper=_CIFAR,
    cifar100_paper_mobilenet=_CIFAR,
)


def _run(name):
    return dict(workdir=f"runs/{name}", checkpoint="best")


TEACHERS = dict(
    digits=dict(name="pgd_at", steps=7, step_size=0.04, ramp_epochs=8.0, length="50%"),
    mnist=_run("pgd_at-mnist"),
    cifar10=_run("trades-cifar10"),
    cifar10_cpu=_run("pgd_at-cifar10_cpu"),
    cifar100=_run("trades-cifar100"),
    cifar10_paper=_run("add-cifar10_teacher"),
    cifar10_paper_mobilenet=_run("add-cifar10_teacher"),
    cifar100_paper=_run("add-cifar100_teacher"),
    cifar100_paper_mobilenet=_run("add-cifar100_teacher"),
)

_MOBILENET = dict(name="mobilenet", width=1.0, dtype="float32")
STUDENTS = dict(
    digits=dict(train=dict(length="80e")),
    mnist=dict(model=dict(name="cnn", width=0.25)),
    cifar10=dict(model=_MOBILENET),
    cifar10_cpu=dict(model=dict(recipes.REDUCED_MODEL, width=recipes.REDUCED_MODEL["width"] // 2)),
    cifar100=dict(model=_MOBILENET),
)


def sgd(*at, lr=0.1, weight_decay=2e-4):
    """SGD with momentum .9 whose rate falls to a tenth at each of some epochs."""
    schedule = dict(name="piecewise", at=[f"{epoch}e" for epoch in at], factor=0.1)
    return dict(name="sgd", lr=lr, momentum=0.9, weight_decay=weight_decay, schedule=schedule)


def papers(epochs, *at, **train):
    """The overrides of a defence's rows: STUDENTS, and the paper rows of a piecewise schedule."""
    long = dict(train=dict(length=f"{epochs}e", optimizer=sgd(*at), **train))
    light = dict(long, model=_MOBILENET)
    rows = {f"{data}_paper": long for data in ("cifar10", "cifar100")}
    return {**STUDENTS, **rows, **{f"{row}_mobilenet": light for row in rows}}


DEFENSE = {
    row: dict(
        name="add",
        teacher=TEACHERS[row],
        temperature=1.0,
        robust_weight=5 / 6,
        clean_weight=1 / 6,
        scale=0.1 if "paper" in row else 1.0,
        **attack,
    )
    for row, attack in ATTACK.items()
}
_TEACHER = dict(name="trades", beta=6.0, steps=10, step_size=2 / 255, ramp_epochs=0.0)
DEFENSE |= dict(cifar10_teacher=_TEACHER, cifar100_teacher=_TEACHER)

_WIDE = dict(
    model=dict(name="wide_resnet", depth=34, width=10, dtype="float32"),
    train=dict(length="100e", optimizer=sgd(75, 90)),
)
OVERRIDES = {
    **papers(300, 215, 260, 285),
    "cifar10_teacher": _WIDE,
    "cifar100_teacher": _WIDE,
}


def get_config(variant="digits"):
    return recipes.make("add", variant, DEFENSE, OVERRIDES)
