"""Turns original distribution files into TFDS data sets: no network, no TensorFlow.

    python experiments/prepare_data.py --from DIR [--data_dir DATA_DIR] [name ...]

DIR holds any of
    mnist/, fashion_mnist/    {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz
    cifar-10-batches-bin/     data_batch_1..5.bin, test_batch.bin, batches.meta.txt
    cifar-100-binary/         train.bin, test.bin, fine_label_names.txt, coarse_label_names.txt
as they are published:
    MNIST            https://ossci-datasets.s3.amazonaws.com/mnist/
    Fashion-MNIST    https://github.com/zalandoresearch/fashion-mnist
    CIFAR            https://www.cs.toronto.edu/~kriz/cifar.html ("binary version")
Each file is checked against its published MD5 sum. Without names, every set that DIR holds is
prepared. A set that is already prepared is left as it is. `digits` needs no files and no
preparation: it is made on first use.
"""

import argparse
import sys

from jaxdefense import extras

try:
    from jaxdefense.data import prepare
except extras.MissingExtra as error:
    sys.exit(f"error: {error}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(prepare.originals()))
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="see above")
    parser.add_argument(
        "--data_dir", help="TFDS's folder; default $TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    args = parser.parse_args(argv)
    try:
        names = args.names or prepare.detect(args.source)
        if not names:
            raise ValueError(f"{args.source} holds none of {', '.join(prepare.originals())}")
        for name in names:
            print(f"{name}: {prepare.prepare(name, args.source, args.data_dir)}", flush=True)
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
