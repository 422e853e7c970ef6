"""Wrong inputs and what is said of them: run by tests/test_bad_input.py, listed in docs/errors.md.

Each message is the whole line, or all of it before the list of known names that follows a
semicolon. In the current folder lie `a_file`, a text, and `a_folder`, which is empty.
"""

import jax
import numpy as np

from jaxdefense import attacks, data, evaluation, losses, mixing, models, runs, threat

# Values: python experiments/train.py --config=pgd_at:digits_debug --config.KEY=VALUE
SETTINGS = (
    ("sed=1", "unknown key of config 'sed'"),
    ("train.optimizer.schedule.nme=cosine", "unknown key of config.train.optimizer.schedule 'nme'"),
    ("train.optimizer.rate.x=1", "unknown key of config.train.optimizer 'rate'"),
    ("seed.x=1", "--config.seed.x: config.seed is a value, 0, without keys"),
    (
        "train=5",
        "--config.train is a section: set its keys, augment, batch_size, checkpoint_every, "
        "length, optimizer, select, steps_per_dispatch, streaming, validate_every",
    ),
    (
        "train.optimizer=adam",
        "--config.train.optimizer is a section: set its keys, lr, name, schedule",
    ),
    ("seed=1e20", "--config.seed must be an integer, got '1e20'"),
    (
        "seed=100000000000000000000",
        "seed must be an integer in [0, 4294967296), got 100000000000000000000",
    ),
    ("seed=-1", "seed must be an integer in [0, 4294967296), got -1"),
    ("seed=4294967296", "seed must be an integer in [0, 4294967296), got 4294967296"),
    ("seed=1099511627776", "seed must be an integer in [0, 4294967296), got 1099511627776"),
    ("seed=true", "--config.seed must be an integer, got 'true'"),
    ("seed=0.5", "--config.seed must be an integer, got '0.5'"),
    ("seed=", "--config.seed must be an integer, got ''"),
    ("name=", "the config's name '' cannot name a file: give one without slashes"),
    ("model.width=-1", "model.width must be larger than 0, got -1.0"),
    ("model.width=0", "model.width must be larger than 0, got 0.0"),
    (
        "defense.steps=1000000000000",
        "defense.steps must be at most 2147483647, got 1000000000000",
    ),
    ("model.width=nan", "model.width must be a finite number, got nan"),
    ("model.width=inf", "model.width must be a finite number, got inf"),
    ("model.width=abc", "--config.model.width must be a number, got 'abc'"),
    ("model.name=cn", "unknown model 'cn'"),
    ("model.name=resnet", "model.width must be an integer, got 0.5"),
    ("dataset.limit=-5", "dataset.limit must be larger than 0, got -5"),
    ("dataset.limit=0", "dataset.limit must be larger than 0, got 0"),
    ("dataset.limit=1.5", "--config.dataset.limit must be an integer, got '1.5'"),
    ("dataset.limit=5", "batch_size must be in 1..5 (all examples), got 16"),
    ("dataset.validation=-1", "digits: validation=-1 holds out -1 of 1297 training examples"),
    ("dataset.validation=0", "digits: validation=0 holds out 0 of 1297 training examples"),
    (
        "dataset.validation=100000",
        "digits: validation=100000 holds out 100000 of 1297 training examples",
    ),
    ("dataset.name=digit", "unknown data set 'digit'"),
    ("dataset.name=../../etc", "unknown data set '../../etc'"),
    ("dataset.name=/etc", "unknown data set '/etc'"),
    ("dataset.name=", "unknown data set ''"),
    ("threat.eps=nan", "threat.eps must be a finite number, got nan"),
    ("threat.eps=-0.1", "eps must be finite and not negative, got -0.1"),
    (
        "threat.eps=8",
        "eps=8.0 is larger than 1, all that images in (0.0, 1.0) allow; eps is in image "
        "units: write 8/255, not 8",
    ),
    ("threat.eps=inf", "threat.eps must be a finite number, got inf"),
    ("threat.eps=8/255", "--config.threat.eps must be a number, got '8/255'"),
    ("threat.norm=linff", "unknown norm 'linff'"),
    ("threat.norm=", "unknown norm ''"),
    ("defense.name=pgd", "unknown defense 'pgd'"),
    ("defense.name=../x", "unknown defense '../x'"),
    ("defense.steps=-1", "steps must be an integer >= 1, got -1"),
    ("defense.steps=0", "steps must be an integer >= 1, got 0"),
    ("defense.steps=2.5", "--config.defense.steps must be an integer, got '2.5'"),
    ("defense.step_size=nan", "defense.step_size must be a finite number or null, got nan"),
    ("defense.step_size=-1", "step_size must be finite and not negative, got -1.0"),
    ("defense.ramp_epochs=nan", "defense.ramp_epochs must be a finite number, got nan"),
    ("defense.ramp_epochs=-3", "ramp_epochs must not be negative, got -3.0"),
    (
        "train.length=0",
        "train.length must be at least one step and fewer than 2147483648, got '0', which is "
        "0 steps",
    ),
    ("train.length=-1e", "train.length: a length must not be negative, got '-1e'"),
    (
        "train.length=nan",
        "train.length: a length is epochs (30 or '30e'), steps ('500s') or a share ('50%'), "
        "got 'nan'",
    ),
    (
        "train.length=inf",
        "train.length: a length is epochs (30 or '30e'), steps ('500s') or a share ('50%'), "
        "got 'inf'",
    ),
    ("train.length=50%", "the run's length is epochs ('30e') or steps ('500s'), got '50%'"),
    (
        "train.length=abc",
        "train.length: a length is epochs (30 or '30e'), steps ('500s') or a share ('50%'), "
        "got 'abc'",
    ),
    (
        "train.length=",
        "train.length: a length is epochs (30 or '30e'), steps ('500s') or a share ('50%'), got ''",
    ),
    (
        "train.length=1e300",
        "train.length must be at least one step and fewer than 2147483648, got '1e300', "
        "which is 1.6e+301 steps",
    ),
    (
        "train.length=3000000000s",
        "train.length must be at least one step and fewer than 2147483648, got "
        "'3000000000s', which is 3e+09 steps",
    ),
    ("train.batch_size=0", "train.batch_size must be larger than 0, got 0"),
    ("train.batch_size=-16", "train.batch_size must be larger than 0, got -16"),
    ("train.batch_size=1000000", "batch_size must be in 1..256 (all examples), got 1000000"),
    ("train.batch_size=16.5", "--config.train.batch_size must be an integer, got '16.5'"),
    ("train.optimizer.lr=nan", "an optimizer needs a positive lr, got nan"),
    ("train.optimizer.lr=inf", "an optimizer needs a positive lr, got inf"),
    ("train.optimizer.lr=0", "an optimizer needs a positive lr, got 0.0"),
    ("train.optimizer.lr=-1", "an optimizer needs a positive lr, got -1.0"),
    ("train.optimizer.name=adm", "unknown optimizer 'adm'"),
    ("train.optimizer.schedule.name=cos", "unknown schedule 'cos'"),
    ("train.augment=", "unknown augmentation ''"),
    ("train.select=best", "unknown train.select 'best'"),
    ("train.validate_every=0", "train.validate_every must be longer than no step, got '0'"),
    ("train.validate_every=-1e", "train.validate_every: a length must not be negative, got '-1e'"),
    (
        "train.validate_every=nan",
        "train.validate_every: a length is epochs (30 or '30e'), steps ('500s') or a share "
        "('50%'), got 'nan'",
    ),
    (
        "train.validate_every=abc",
        "train.validate_every: a length is epochs (30 or '30e'), steps ('500s') or a share "
        "('50%'), got 'abc'",
    ),
    (
        "train.checkpoint_every=-1",
        "train.checkpoint_every: a length must not be negative, got '-1'",
    ),
    (
        "train.checkpoint_every=inf",
        "train.checkpoint_every: a length is epochs (30 or '30e'), steps ('500s') or a share "
        "('50%'), got 'inf'",
    ),
    ("train.steps_per_dispatch=0", "train.steps_per_dispatch must be larger than 0, got 0"),
    ("train.steps_per_dispatch=-1", "train.steps_per_dispatch must be larger than 0, got -1"),
    ("train.streaming=7", "--config.train.streaming must be true or false, got '7'"),
    ("validation.steps=0", "steps must be an integer >= 1, got 0"),
    ("validation.step_size=nan", "step_size must be finite and not negative, got nan"),
    ("validation.name=apgd_targeted", "unknown option of attack apgd_targeted 'step_size'"),
    ("validation.name=pdg", "unknown attack 'pdg'"),
    ("validation.name=square", "unknown option of attack square 'steps'"),
    ("evaluation.attacks.pgd20.steps=-1", "steps must be an integer >= 1, got -1"),
    (
        "evaluation.attacks.pgd20.step_size=inf",
        "step_size must be finite and not negative, got inf",
    ),
    ("evaluation.attacks.pgd20.name=fgs", "unknown attack 'fgs'"),
    ("evaluation.attacks.pgd99.steps=3", "unknown key of config.evaluation.attacks 'pgd99'"),
    ("evaluation.batch_size=0", "evaluation.batch_size must be larger than 0, got 0"),
    ("evaluation.batch_size=-3", "evaluation.batch_size must be larger than 0, got -3"),
    ("evaluation.audit.steps=0", "evaluation.audit.steps must be larger than 0, got 0"),
    ("evaluation.audit.queries=-4", "evaluation.audit.queries must be larger than 0, got -4"),
    ("evaluation.audit.restarts=0", "evaluation.audit.restarts must be larger than 0, got 0"),
)

# Commands: python experiments/...
COMMANDS = (
    ("evaluate.py --workdir=nothing", "nothing holds no run: there is no config.json"),
    ("evaluate.py --pretrained=pgd", "unknown pretrained network 'pgd'"),
    ("evaluate.py --workdir=a_folder --protocol=auto", "unknown value of --protocol 'auto'"),
    ("evaluate.py --workdir=a_folder --examples=-5", "--examples must be an integer >= 1, got -5"),
    (
        "evaluate.py --workdir=a_folder --record=a_folder",
        "--record must be a file, and a_folder is a folder",
    ),
    ("evaluate.py --workdr=a", "unknown flag 'workdr'"),
    ("tables.py a_file", "a_file is not a record: Expecting value: line 1 column 1 (char 0)"),
    ("tables.py --html=a_folder", "--html must be a file, and a_folder is a folder"),
    ("tables.py --into=nothing.md", "--into renews a file, and there is none at nothing.md"),
    ("paired.py", "need two rows, e.g. gssl-mnist_small gssl_baseline-mnist_small"),
    ("export.py --workdir=a_folder --file=x.txt", "--file must end in .safetensors, got x.txt"),
    (
        "export.py --workdir=a_folder --file=x.safetensors --zoo=a_folder",
        "--zoo exports every run of a folder: leave out --workdir and --file",
    ),
    (
        "prepare_data.py --from nothing",
        "nothing holds none of cifar10, cifar100, fashion_mnist, imagenette, "
        "mnist, svhn_cropped, tiny_imagenet",
    ),
    ("prepare_data.py --from", "argument --from: expected one argument"),
    (
        "prepare_data.py ../../etc --data_dir=d",
        "unknown data set with original files '../../etc'",
    ),
    ("quickstart.py --systems=nothing --workdir=q", "unknown system 'nothing'"),
    ("quickstart.py --processes=x", "--processes must be a positive integer, got 'x'"),
    ("study.py --side_by_side=0", "--side_by_side must be a positive integer, got '0'"),
    ("study.py --hours=-1", "--hours must be a non-negative number, got '-1'"),
    ("study.py --hours=nan", "--hours must be a non-negative number, got 'nan'"),
    ("study.py --choose --list", "--choose has no --list: it measures its candidates"),
    (
        "study.py --gird=cpu",
        "unknown flag 'gird'; nearest: grid, again; known: again, choose, grid, hours, list, "
        "minutes, progress, records, renew, rows, side_by_side, workdir; --help explains them",
    ),
    (
        "quickstart.py --sistems=m2at",
        "unknown flag 'sistems'; nearest: systems; known: processes, progress, records, systems, "
        "variant, workdir; --help explains them",
    ),
    ("benchmark --repeats=0 conv", "--repeats must be an integer >= 1, got 0"),
    (
        "benchmark --runs=nothing:x fast",
        "--runs=nothing:x: invalid literal for int() with base 10: 'x'",
    ),
    (
        "papers/cost_sensitive.py --workdir=a_folder --eps=nan",
        "--eps must be a number, got 'nan'",
    ),
)

# Expressions, each of which raises a ValueError; `namespace` has their names.
CALLS = (
    (
        "threat.Linf(8)",
        "eps=8 is larger than 1, all that images in (0.0, 1.0) allow; eps is in image units: "
        "write 8/255, not 8",
    ),
    ('threat.Linf("8/255")', "eps must be a number or one per example, got '8/255'"),
    ("threat.Linf(np.nan)", "eps must be finite and not negative, got nan"),
    ("threat.Linf([])", "eps must be a number or one per example, got []"),
    ("threat.Linf({})", "eps must be a number or one per example, got {}"),
    ("threat.Linf(1j)", "eps must be a number or one per example, got 1j"),
    ("threat.Linf(True)", "eps must be a number or one per example, got True"),
    ("threat.L2(-1)", "eps must be finite and not negative, got -1"),
    (
        "threat.L2(0.5, bounds=(0, np.inf))",
        "bounds must be (low, high), finite and low < high, got (0, inf)",
    ),
    (
        "threat.L2(0.5, bounds=(1, 0))",
        "bounds must be (low, high), finite and low < high, got (1, 0)",
    ),
    ('threat.make("l3", 0.1)', "unknown norm 'l3'"),
    (
        "attacks.pgd(8 / 255)",
        "pgd needs a threat first, e.g. pgd(threat.Linf(8 / 255)), got 0.03137254901960784",
    ),
    ("attacks.pgd(ball, steps=2.0)", "steps must be an integer >= 1, got 2.0"),
    ("attacks.pgd(ball, step_size=np.nan)", "step_size must be finite and not negative, got nan"),
    ('attacks.pgd(ball, loss="ce")', "unknown loss 'ce'"),
    ('attacks.pgd(ball, random_start="yes")', "pgd.random_start must be true or false, got 'yes'"),
    (
        "attacks.pgd(ball)(predict, 0, images, labels)",
        "need a typed key, e.g. jax.random.key(0), got 0",
    ),
    (
        "attacks.pgd(ball)(predict, key, 255 * images, labels)",
        "images must lie in (0.0, 1.0), got [127.5, 127.5]; normalise inside the model, or "
        "give the threat the bounds of your images",
    ),
    (
        "attacks.pgd(ball)(predict, key, np.uint8(255 * images), labels)",
        "images must be floating in (0.0, 1.0), got uint8; divide uint8 by 255",
    ),
    (
        "attacks.pgd(ball)(predict, key, np.nan * images, labels)",
        "images contain NaN or infinite values",
    ),
    (
        "attacks.pgd(ball)(predict, key, images, labels + 10)",
        "labels must be in [0, 10), got values in [10, 13]",
    ),
    (
        "attacks.pgd(ball)(predict, key, images, labels[:2])",
        "labels must be (4,) integers, got shape (2,) of int32",
    ),
    (
        "attacks.pgd(ball)(lambda x: (predict(x),), key, images, labels)",
        "predict must return logits (B, K), got a tuple: give e.g. predict(x)[0]",
    ),
    ('attacks.make("pdg", ball)', "unknown attack 'pdg'"),
    ('attacks.make("os", ball)', "unknown attack 'os'"),
    ("attacks.apgd(ball, rho=2)", "rho must be in [0, 1], got 2"),
    ("attacks.fab(ball, eta=0)", "eta must be at least 1, got 0"),
    ("attacks.square(ball, queries=0)", "queries must be an integer >= 1, got 0"),
    (
        "attacks.cw(ball)",
        "cw is an L2 attack, got Linf(eps=0.1, bounds=(0.0, 1.0)); fmn and fab know every norm",
    ),
    ('attacks.autoattack(ball, version="full")', "unknown AutoAttack version 'full'"),
    ("attacks.worst_case(3)", "worst_case takes attacks one after another, got 3"),
    ('losses.make("ce")', "unknown loss 'ce'"),
    ("losses.one_hot(labels, 0)", "num_classes must be at least 1, got 0"),
    ("losses.one_hot(labels, 10, smoothing=2)", "smoothing must be in [0, 1], got 2"),
    (
        "losses.distillation(logits, logits, temperature=0)",
        "temperature must be positive and finite, got 0",
    ),
    ("mixing.smooth(np.eye(4), 2.0)", "share must be in [0, 1], got 2.0"),
    ("mixing.weights(0, 4)", "need a typed key, e.g. jax.random.key(0), got 0"),
    ("mixing.weights(key, 4, alpha=-1)", "alpha must be positive and finite, got -1"),
    ('models.make("../cnn", 10)', "unknown model '../cnn'"),
    ('models.make("cnn", 1)', "need num_classes, an integer of at least 2, got 1"),
    ('models.make("cnn", 10, width=np.nan)', "model.width must be a finite number, got nan"),
    (
        'models.make("cnn", 10, dtype="float99")',
        "unknown compute dtype 'float99'; allowed: float32, bfloat16",
    ),
    (
        'models.make("cnn", 10, mean=[0.5], std=[0.0])',
        "model.std[0] must be larger than 0, got 0.0",
    ),
    ('models.load("nothing")', "no such file: nothing"),
    ('models.load_pretrained("../x")', "unknown pretrained network '../x'"),
    ('data.from_folder("nothing")', "there is no folder nothing"),
    ('data.load("digits", "valid")', "unknown split 'valid'"),
    (
        'data.load("digits", "train", seed=2**32)',
        "seed must be an integer in [0, 4294967296), got 4294967296",
    ),
    ('data.load("../../etc", "train")', "unknown data set '../../etc'"),
    (
        "evaluation.Evaluator(predict, 0.1)",
        "the threat must be a norm with its eps, e.g. threat.Linf(8 / 255), got 0.1",
    ),
    (
        "evaluator.bits((), images, labels, None, [attacks.fgsm(ball)])",
        "attacks must be a mapping {name: attack}, got [fgsm(Linf(eps=0.1, bounds=(0.0, 1.0)))]",
    ),
    (
        'evaluator.bits((), images, labels, None, {"fgsm": attacks.fgsm(ball)}, seed=-1)',
        "seed must be an integer in [0, 4294967296), got -1",
    ),
    (
        'evaluator.bits((), images, labels, None, {"pgd": attacks.pgd(threat.Linf(0.2))})',
        "attack pgd was made for Linf(eps=0.2, bounds=(0.0, 1.0)), and this evaluation is of "
        "Linf(eps=0.1, bounds=(0.0, 1.0))",
    ),
    (
        "evaluation.autoattack(predict, images, labels, ball, seed=2**40)",
        "seed must be an integer in [0, 4294967296), got 1099511627776",
    ),
    (
        "evaluation.autoattack(predict, images[:0], labels[:0], ball)",
        "there are no images: shape (0, 8, 8, 1)",
    ),
    (
        "evaluation.autoattack(predict, images[0], labels[0], ball)",
        "labels must be (8,) integers, got shape () of int64; one image is a batch of one: "
        "images[None], labels[None]",
    ),
    (
        "evaluation.autoattack(predict, images, labels, ball, attacks=())",
        "attacks must name stages, e.g. ('apgd-ce', 'square'), got ()",
    ),
    (
        'evaluation.autoattack(predict, images, labels, ball, attacks="square")',
        "attacks must name stages, e.g. ('apgd-ce', 'square'), got 'square'",
    ),
    (
        "evaluation.autoattack(lambda a, b, x: predict(x), images, labels, ball)",
        "predict must take (images): wrap it in a function that does",
    ),
    (
        "attacks.jitted(attacks.pgd(ball), lambda w, x: predict(x))((), key, images[:0], "
        "labels[:0])",
        "there are no images: shape (0, 8, 8, 1)",
    ),
    (
        "attacks.jitted(attacks.pgd(ball), lambda w, x: predict(x))((), key, np.nan * images, "
        "labels)",
        "images contain NaN or infinite values",
    ),
    (
        'evaluator.bits((), images, labels, np.arange(4), {"clean": attacks.fgsm(ball)})',
        "no attack may be called 'clean', as the accuracy without one is",
    ),
    (
        'evaluator.bits((), images, labels, np.arange(4), {"../a": attacks.fgsm(ball)})',
        "attack '../a' cannot name a file: give one without slashes",
    ),
    (
        'evaluation.autoattack(predict, images, labels, ball, folder="a_file")',
        "folder must be a folder, and a_file is a file",
    ),
    (
        "attacks.pgd(ball, steps=10**12)",
        "steps must be at most 2147483647, got 1000000000000",
    ),
    (
        "evaluation.audit(predict, images, labels, ball, batch_size=0)",
        "batch_size must be an integer >= 1, got 0",
    ),
    ('runs.restore("a_folder")', "a_folder holds no run: there is no config.json"),
    ("runs.build(None)", "a config must be a mapping of sections, got None"),
    ('runs.build({"sed": 1})', "unknown config section 'sed'"),
)


def namespace():
    """What the expressions of `CALLS` name."""
    ball = threat.Linf(0.1)

    def predict(x):
        return 10 * x.reshape(len(x), -1)[:, :10]

    return {
        "np": np,
        "attacks": attacks,
        "data": data,
        "evaluation": evaluation,
        "losses": losses,
        "mixing": mixing,
        "models": models,
        "runs": runs,
        "threat": threat,
        "ball": ball,
        "evaluator": evaluation.Evaluator(lambda _, x: predict(x), ball),
        "images": np.full((4, 8, 8, 1), 0.5, np.float32),
        "key": jax.random.key(0),
        "labels": np.arange(4),
        "logits": np.zeros((4, 10), np.float32),
        "predict": predict,
    }
