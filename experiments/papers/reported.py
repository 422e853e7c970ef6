"""Numbers that the documents report, as data: percent, all FOUND in the paper or its code.

Reference: Shen et al., arXiv 2101.12372, read in the released notebooks: accuracies over all
classes, and metric I; CIFAR-10's at eps .03, and without PGD, which its notebook ran on other
networks (of eps .3).
"""

COST_SENSITIVE_COLUMNS = (
    "clean",
    "normalised fgsm",
    "normalised deepfool3",
    "normalised pgd40 (invalid)",
)
COST_SENSITIVE = {
    "standard-mnist_example": (98.82, 68.60, 4.80),
    "fgsm_at-mnist_example": (None, 94.74, 23.99),
    "cse-mnist_example": (98.47, 93.66, 75.94),
}
METRIC_I = {
    "standard-fashion_mnist_paper": (90.51, 5.94, 19.79, 8.85),
    "fgsm_at-fashion_mnist_paper": (90.52, 89.53, 73.42, 17.02),
    "cse-fashion_mnist_paper": (83.43, 71.24, 80.04, 48.66),
    "standard-cifar10_paper": (65.49, 28.06, 22.21),
    "fgsm_at-cifar10_paper": (64.44, 44.07, 26.33),
    "csa-cifar10_paper": (60.58, 43.84, 23.28),
    "cse-cifar10_paper": (56.10, 31.15, 27.96),
}


def cost_sensitive(table: dict[str, tuple[float | None, ...]], name: str) -> dict[str, float]:
    """{column: percent} that the notebooks report of a row; empty for another row.

    Args:
      table: `COST_SENSITIVE` or `METRIC_I`.
      name: of the row.
    """
    values = zip(COST_SENSITIVE_COLUMNS, table.get(name, ()), strict=False)
    return {column: value for column, value in values if value is not None}
