"""Prepares data sets for TFDS: from downloads or from files that you have, without TensorFlow.

    python experiments/prepare_data.py cifar10 svhn_cropped          # downloads them
    python experiments/prepare_data.py --from DIR [name ...]         # no network

DIR holds any of                                      published at
    mnist/            four IDX files (.gz)            https://ossci-datasets.s3.amazonaws.com/mnist/
    fashion_mnist/    four IDX files (.gz)            https://github.com/zalandoresearch/fashion-mnist
    cifar-10-batches-bin/, cifar-100-binary/          https://www.cs.toronto.edu/~kriz/cifar.html
                      ("binary version", unpacked)
    svhn/             {train,test}_32x32.mat          http://ufldl.stanford.edu/housenumbers/
    imagenette2-160/  (unpacked)                      https://github.com/fastai/imagenette
    tiny-imagenet-200/  (unpacked)     http://cs231n.stanford.edu/tiny-imagenet-200.zip
Files are checked against their published sums; ImageNette's and Tiny-ImageNet's are counted.
Without names, every set that DIR holds is prepared. A set that is already prepared is left as it
is, and none is ever half prepared. Any other image set of TFDS may be named too: TFDS downloads and
prepares it, which may need TensorFlow. `digits` needs nothing: it is made on first use.
"""

import argparse
import sys

from jaxdefense import extras, interrupts, registry

try:
    from jaxdefense.data import prepare
except extras.MissingExtra as error:
    sys.exit(f"error: {error}")


class _Parser(argparse.ArgumentParser):
    """argparse's, but for errors of one line."""

    def error(self, message):
        _, _, unknown = message.partition("unrecognized arguments: ")
        if unknown.startswith("-"):
            try:
                registry.raise_unknown("flag", unknown.split()[0], self._option_string_actions)
            except ValueError as error:
                message = str(error)
        self.exit(2, f"error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(prepare.originals()))
    parser.add_argument("--from", dest="source", metavar="DIR", help="see above")
    parser.add_argument(
        "--data_dir", help="TFDS's folder; default $TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    args = parser.parse_args(argv)
    try:
        names = args.names or (prepare.detect(args.source) if args.source else [])
        if not names and not args.source:
            parser.error("name a data set, or the folder of original files with --from DIR")
        if not names:
            raise ValueError(f"{args.source} holds none of {', '.join(prepare.originals())}")
        for name in names:
            print(f"{name}: {prepare.prepare(name, args.source, args.data_dir)}", flush=True)
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    told = "what is prepared is whole, and the same command prepares the rest"
    with interrupts.one_line_endings(interrupts.Ending(told, prefix="prepare_data")):
        code = main()
    sys.exit(code)
