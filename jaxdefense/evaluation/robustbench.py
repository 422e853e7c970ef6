"""An entry for RobustBench's leaderboard, in the form of its model_info files.

Reference: Croce et al., RobustBench: a standardized adversarial robustness benchmark,
arXiv 2010.09670.
"""

from typing import Any

from jaxdefense.evaluation.records import Record
from jaxdefense.evaluation.tables import format_eps, record_threat


def entry(record: Record, architecture: str) -> dict[str, Any]:
    """A record of AutoAttack as one of RobustBench's JSON files; "" is for its author to fill in.

    "additional_data" is false: a run here is trained on its data set alone. "unreliable" says
    whether the evaluation raised a warning or an error.

    Args:
      record: of the protocol 'autoattack'.
      architecture: as the leaderboard shows it, "WideResNet-34-10" say.

    Raises:
      ValueError: a record of another protocol, or of several predictors.

    >>> from jaxdefense.evaluation import robustbench
    >>> accuracy = {"clean": {"accuracy": 84.92}, "autoattack": {"accuracy": 53.08, "n": 10000}}
    >>> config = {"dataset": {"name": "cifar10"}, "threat": {"norm": "linf", "eps": 8 / 255}}
    >>> record = {"name": "trades", "protocol": "autoattack", "config": config}
    >>> record |= {"results": {"classifier": accuracy}, "cascade": {"flags": []}, "reported": {}}
    >>> found = robustbench.entry(record, "WideResNet-34-10")
    >>> found["eps"], found["clean_acc"], found["autoattack_acc"], found["unreliable"]
    ('8/255', '84.92', '53.08', False)
    """
    if record.get("protocol") != "autoattack" or len(record["results"]) != 1:
        raise ValueError(
            "RobustBench's form holds AutoAttack on one predictor, got protocol "
            f"{record.get('protocol')!r} on {', '.join(record['results'])}"
        )
    (results,) = record["results"].values()
    reported = record.get("reported", {}).get("autoattack", {}).get("value")
    n = results["autoattack"]["n"]
    flags = record["cascade"]["flags"]
    return {
        "link": "",
        "name": record["name"],
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": record["config"]["dataset"]["name"],
        "venue": "",
        "architecture": architecture,
        "eps": format_eps(record_threat(record)["eps"]),
        "clean_acc": f"{results['clean']['accuracy']:.2f}",
        "reported": "" if reported is None else f"{reported:.2f}",
        "autoattack_acc": f"{results['autoattack']['accuracy']:.2f}",
        "footnote": f"AutoAttack of jaxdefense on {n} test images.",
        "unreliable": any(flag["severity"] != "note" for flag in flags),
    }
