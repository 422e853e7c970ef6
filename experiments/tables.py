"""Prints Markdown tables from records: files, or folders searched for *.json.

python experiments/tables.py experiments/records/mnist
python experiments/tables.py --per_class=pgd40 experiments/records/mnist
"""

import cli
from absl import flags

from jaxdefense.evaluation import records, tables

PER_CLASS = flags.DEFINE_string("per_class", None, "Accuracy per class under this attack instead.")


def main(argv):
    found = records.load_all(argv[1:] or ["experiments/records"])
    if not found:
        raise ValueError(f"no records in {argv[1:]}")
    if PER_CLASS.value:
        print(tables.class_table(found, PER_CLASS.value))
    else:
        print(tables.accuracy_table(found))
    print(f"\n{tables.provenance(found)}")


if __name__ == "__main__":
    cli.run(main)
