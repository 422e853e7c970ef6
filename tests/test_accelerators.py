"""The accelerator check: every program lowers for TPU and CUDA, and costs count loops in full.

What compiles for a TPU, and fits there, `make tpu-check` says; these tests need no TPU library.
"""

import importlib.metadata
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from accelerators import costs, folding, programs, tables
from conftest import ROOT

from jaxdefense import models

# The quick ones: a step with an attack in it, a search with runs, one without gradients.
QUICK = ("m2at", "autoattack apgd-t", "autoattack square")
SYSTEMS = ("add", "claf", "csa", "cse", "gssl", "ipg", "m2at", "pgd_at")
ATTACKS = {n: found for n, found in programs.attack_rows().items() if n != programs.FOLDED}


def cases(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture
def digits(monkeypatch, tmp_path):
    """(config's name) -> its run on blank 8x8 images, a narrow network."""
    monkeypatch.setitem(programs.DATASETS, "digits", ((8, 8, 1), 10, 1437, 360))

    def build(name):
        config = programs.load_config(f"{name}:digits_debug", "float32")
        return programs.build_run(config, tmp_path)

    return build


def lowered(program):
    """The platforms that a program lowers for."""
    mapped = jax.jit(lambda *arguments: program.mapped(*arguments))
    exported = jax.export.export(mapped, platforms=("tpu", "cuda"))(*program.arguments)
    return exported.platforms


@pytest.mark.parametrize("name", cases(SYSTEMS))
def test_every_phase_lowers_for_tpu_and_cuda(name, digits):
    with programs.traced_for("tpu"):
        run = digits(name)
        found = list(programs.training(run, jax.devices()))
        assert [program.name for program in found] == list(
            dict.fromkeys(phase.name for phase in run.defense.phases)
        )
        for program in found:
            assert lowered(program) == ("tpu", "cuda")


@pytest.mark.parametrize("name", cases(ATTACKS))
def test_every_attack_lowers_for_tpu_and_cuda(name, digits):
    attack, rounds = ATTACKS[name]
    with programs.traced_for("tpu"):
        program = programs.judging(
            digits("pgd_at"), name, attack, jax.devices(), batch_size=8, rounds=rounds
        )
        assert lowered(program) == ("tpu", "cuda")
    assert program.times == 45  # 360 images


@pytest.mark.slow
def test_the_folded_network_is_the_network():
    calls, logits = folding.problem(width=4, batch=2)
    np.testing.assert_allclose(logits["folded"], logits["plain"], rtol=1e-4, atol=1e-5)
    assert set(calls) == {"plain", "folded"}


def test_tracing_for_another_platform_changes_what_is_traced():
    def text():
        model = models.make("cnn", 10, width=0.25)
        return str(jax.make_jaxpr(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))

    here = text()
    with programs.traced_for("tpu"):
        assert "custom_vjp_call" not in text()
    assert "custom_vjp_call" in here


def test_a_pgd_attack_costs_a_pass_back_and_forth_for_each_step(digits):
    """Without padding's zeros, a pass back to the images costs what the pass forward does."""
    run = digits("pgd_at")
    with programs.traced_for("tpu"):
        attack = ATTACKS["pgd"][0]  # 20 steps
        program = programs.judging(run, "pgd", attack, jax.devices()[:1], batch_size=8)
        attacked = jax.make_jaxpr(program.body)(*program.inputs)
        apply = run.apply("classifier")
        variables, _, images, *_ = program.inputs
        forward = jax.make_jaxpr(apply)(variables, images)
    one = costs.products(forward.jaxpr)
    # 20 steps of two passes, and the check of what was found
    assert costs.products(attacked.jaxpr) == pytest.approx(41 * one, rel=1e-6)


def test_products_of_a_convolution_leave_out_padding():
    def product(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    jaxpr = jax.make_jaxpr(product)(jnp.zeros((5, 8, 8, 3)), jnp.zeros((3, 3, 3, 7)))
    # Four outputs a side, three taps each, of which the first output's first lies outside.
    assert costs.products(jaxpr.jaxpr) == 2 * 5 * 11 * 11 * 3 * 7


def test_products_of_resnet18_are_those_of_pencil_and_paper():
    """docs/accelerators.md has the number: .96 GFLOP an image."""
    model = models.make("resnet", 10, depth=18)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    with programs.traced_for("tpu"):
        found = costs.products(jax.make_jaxpr(model.apply)(variables, image).jaxpr)

    def three(side, channels, out, stride=1):  # 3x3, padding 1: the outer outputs lack a tap
        taps = 3 * side - 2 if stride == 1 else 3 * side // 2 - 1
        return taps**2 * channels * out

    total = three(32, 3, 64) + 4 * three(32, 64, 64) + 512 * 10
    for side, channels in ((32, 64), (16, 128), (8, 256)):
        half, out = side // 2, 2 * channels
        total += three(side, channels, out, 2) + 3 * three(half, out, out)
        total += half**2 * channels * out  # 1x1
    assert found == 2 * total
    assert round(found / 1e9, 2) == 0.96


SQUARE = jnp.zeros((64, 64))


def fixed(x, turns=7):
    return jax.lax.fori_loop(0, turns, lambda i, x: x @ x, x)


def bounded(x):
    return jax.lax.while_loop(
        lambda c: (c[0] <= 6) & jnp.all(c[1] < 9), lambda c: (c[0] + 1, c[1] @ c[1]), (0, x)
    )


def unbounded(x):
    return jax.lax.while_loop(lambda x: jnp.any(x < 9), lambda x: fixed(x) @ x, x)


@pytest.mark.parametrize(("function", "turns"), [(fixed, 7), (bounded, 7), (unbounded, 24)])
def test_loops_cost_the_products_of_all_their_turns(function, turns):
    jaxpr = jax.make_jaxpr(function)(SQUARE).jaxpr
    product = 2 * 64**3
    assert costs.products(jaxpr, rounds=3) == turns * product
    assert costs.products(jaxpr, in_full=False) == (2 if function is unbounded else 1) * product


def bytes_of(function, rounds=1):
    """(bodies counted once, in full) of the compiled program."""
    traffic = costs.Traffic(jax.jit(function).lower(SQUARE).compile().as_text(), rounds)
    return traffic.once, traffic.full


def test_a_loop_adds_the_same_bytes_in_every_turn():
    once, seven = bytes_of(fixed)
    thirteen = bytes_of(lambda x: fixed(x, turns=13))[1]
    assert seven - once == thirteen - seven  # 6 turns
    assert seven - once >= 6 * 2 * SQUARE.nbytes  # a product reads and writes


def test_a_loop_up_to_a_number_takes_one_turn_more():
    def below(x):
        return jax.lax.while_loop(
            lambda c: (c[0] < 7) & jnp.all(c[1] < 9), lambda c: (c[0] + 1, c[1] @ c[1]), (0, x)
        )

    assert bytes_of(bounded) == bytes_of(below)


def test_a_loop_without_a_number_takes_the_rounds():
    once, one = bytes_of(unbounded, rounds=1)
    two, three = (bytes_of(unbounded, rounds)[1] for rounds in (2, 3))
    assert three - two == two - one >= 8 * 2 * SQUARE.nbytes
    assert one > once + 6 * 2 * SQUARE.nbytes  # the loop inside


def test_the_numbers_of_xla_are_scaled_to_all_turns():
    text = jax.jit(unbounded).lower(SQUARE).compile().as_text()
    traffic = costs.Traffic(text, rounds=3)
    jaxpr = jax.make_jaxpr(unbounded)(SQUARE).jaxpr
    found = costs.cost(costs.Cost(100.0, 1000.0), text, jaxpr, rounds=3)
    assert found == (100 * 24 / 2, 1000 * traffic.full / traffic.once)


def program(name, flops, moved, memory, times):
    return dict(name=name, flops=flops, products=flops / 2, moved=moved, memory=memory, times=times)


def test_the_table_says_what_fits_and_how_long_it_takes_at_least():
    row = dict(row="two:cifar10", dtype="float32", kind="train", programs=[
        program("first", 2e12, 1e9, 1e9, 3600), program("second", 1e12, 9e9, 17e9, 7200)
    ])  # fmt: skip
    failed = dict(row="attack bad", dtype="bfloat16", failed="Error: a | b")
    limits = dict(flops=1e12, bandwidth=1e9, memory=16e9)
    text = tables.render({"name": "accelerators", "rows": [row, failed], "limits": limits})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert " ".join(lines[2][2:]) == "1.00 yes 2000 50.0% 1.0 arithmetic 2000.00 3,600 120.00"
    assert " ".join(lines[3][2:]) == "17.00 NO 1000 50.0% 9.0 memory 9000.00 7,200 1080.00"
    assert lines[4][0] == "two:cifar10, whole run"
    assert lines[4][-1] == "1200.00"
    assert lines[5][:3] == ["attack bad", "bfloat16", "Error: a / b"]
    assert tables.summary([row, failed]) == "1 rows compile, 1 do not: attack bad bfloat16"


def test_the_table_of_folding_has_medians():
    row = dict(width=16, batch=32, plain=[1.0, 3.0, 2.0], folded=[4.0, 1.0, 9.0], ratio=1.5)
    line = tables.render({"name": "folding", "rows": [row]}).splitlines()[2]
    assert line == "| ResNet-18, width 16, 32 images | 3 | 2.00 | 4.00 | 1.50 |"


def test_the_makefile_installs_the_libtpu_that_jax_names():
    (pinned,) = re.findall(r"'(libtpu==[\d.*]+)'", (ROOT / "Makefile").read_text())
    required = re.findall(r"^jax==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    if required != [importlib.metadata.version("jax")]:
        pytest.skip("another jax than requirements.txt's")
    named = [r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
    assert [r.partition(";")[0].strip() for r in named] == [pinned]
