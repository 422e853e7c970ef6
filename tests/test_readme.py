"""README and docs: their examples run, their commands exist, and their numbers are the records'."""

import configparser
import itertools
import pathlib
import re

import configs
import pytest
import tables

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in tables.pages()}
WITH_CODE = [name for name, text in PAGES.items() if "```python" in text]


def blocks(text, language):
    """The code blocks of a page in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", WITH_CODE)
def test_examples_run(name, tfds_dir, tmp_path, monkeypatch):
    """All of a page in one namespace, in a folder of its own, as a reader would paste it."""
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks(PAGES[name], "python"):
        exec(compile(block, name, "exec"), namespace)


def test_the_main_pages_have_examples():
    assert {"README.md", "docs/attack.md", "docs/judge.md", "docs/train.md"} <= set(WITH_CODE)


@pytest.fixture(scope="module")
def known():
    return tables.known_percentages()


@pytest.mark.parametrize("name", PAGES)
def test_numbers_have_their_records(name, known):
    """As `python experiments/tables.py --check` says of all pages."""
    assert tables.problems(PAGES[name], known) == []


def test_a_number_without_a_record_is_a_problem():
    marked = "<!-- accuracy experiments/records/mnist; pgd_at-mnist; pgd40 -->"
    right = tables.number(ROOT / "experiments/records/mnist", "pgd_at-mnist", "pgd40")
    page = f"# Page\n\nIt keeps {marked}{right}<!-- end -->, and 60.47 % of jax 0.10.2 at .03.\n"
    assert tables.problems(page, {60.47}) == []
    assert tables.problems(page, {60.4}) == ["60.47 is in no record and no paper's report"]
    (problem,) = tables.problems(page.replace(right, "99.00"), {60.47})
    assert problem.startswith("is not renewed: ")
    assert "99.00" in problem
    assert right[:5] in problem
    excused = page + "\n<!-- not accuracies: 5 -->\n\nMore than 5 % of `7 %`.\n"
    assert tables.problems(excused, {60.47}) == []
    assert tables.problems(page + "7 %", {60.47}) == ["7 is in no record and no paper's report"]
    (problem,) = tables.problems("<!-- table experiments/records/none -->\n<!-- end -->", set())
    assert problem == "shows experiments/records/none, which is not there"
    apart = "study/mnist/configured; gssl-mnist_small; gssl_baseline-mnist_small; clean"
    apart = f"experiments/records/{apart}"
    text = tables.renew(f"<!-- difference {apart} --><!-- end -->")
    assert text == f"<!-- difference {apart} -->-0.58 ± 0.06<!-- end -->"


def test_every_folder_of_records_is_shown():
    shown = {path for text in PAGES.values() for path in tables.shown(text)}
    folders = [path for path in (ROOT / "experiments" / "records").iterdir() if path.is_dir()]
    for folder in folders:
        path = folder.relative_to(ROOT)
        assert any(pathlib.Path(found).is_relative_to(path) for found in shown), path


def test_a_number_says_which_row_is_missing():
    records = "experiments/records/mnist"
    number = tables.number(ROOT / records, "pgd_at-mnist", "pgd40")
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d \(3\)", number)
    assert tables.number(ROOT / records, "pgd_at-mnist[classifier]", "pgd40") == number
    marked = f"a <!-- accuracy {records}; pgd_at-mnist; pgd40 -->0<!-- end --> b"
    assert tables.renew(marked) == marked.replace(">0<", f">{number}<")
    fast = "experiments/records/benchmark/fast.json"
    left = tables.number(ROOT / fast, "csa-digits, linf 0.15, 500 images", "standard")
    assert (
        f"square {round(5 * float(left))} |" in PAGES["docs/speed.md"].partition("| csa-digits")[2]
    )
    with pytest.raises(ValueError, match="nearest: pgd_at-mnist"):
        tables.number(ROOT / records, "pgd-mnist", "pgd40")
    with pytest.raises(ValueError, match="nearest: pgd40"):
        tables.number(ROOT / records, "pgd_at-mnist", "pgd4")


def commands(text):
    """The words of each `python experiments/...` of a page's sh blocks, its loops unrolled."""
    for block in blocks(text, "sh"):
        block = re.sub(r"\\\n\s*", " ", block)
        loops = dict(re.findall(r"for (\w+) in ([^;\n]*);", block))
        for line in re.findall(r"python (experiments/[^\n#]*)", block):
            used = [name for name in loops if re.search(rf"\$\{{?{name}\b", line)]
            for values in itertools.product(*(loops[name].split() for name in used)):
                words = line
                for name, value in zip(used, values, strict=True):
                    words = re.sub(rf"\$(?:{name}\b|\{{{name}\}})", value, words)
                yield words.split()


COMMANDS = {(name, " ".join(words)) for name, text in PAGES.items() for words in commands(text)}


@pytest.mark.parametrize(("name", "command"), sorted(COMMANDS))
def test_commands_name_scripts_flags_and_configs(name, command):
    script, *words = command.split()
    path = ROOT / script
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    assert all(file.exists() for file in files), script
    sources = "".join(file.read_text() for file in files)
    known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', sources))
    known |= set(re.findall(r'"--(\w+)"', sources)) | {"help", "config"}
    for word in words:
        flag, _, value = word.partition("=")
        if re.fullmatch(r"--\w+", flag):
            assert flag[2:] in known, word
        if flag == "--config" and "$" not in value:
            configs.load(*value.split(":"))


def test_commands_are_found():
    found = {command for _, command in COMMANDS}
    assert "experiments/train.py --config=fgsm_at:mnist_example --config.seed=2 " in {
        f"{command} ".partition("--workdir")[0] for command in found
    }
    assert len(found) > 40


def slug(heading):
    """The anchor of a heading, as GitHub and the site's builder make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    here = (ROOT / name).parent
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        if path.startswith(("https://", "api/")):
            continue
        found = (here / path) if path else ROOT / name
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target
        if found.suffix == ".svg":
            assert len(text) > 20, f"{target} needs a text for who cannot see it"


def test_the_readme_is_short_and_in_a_newcomer_s_order():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 200
    places = [readme.index(part) for part in ("make quickstart", "](docs/images/", "## Install")]
    headings = ("Attack a model", "Judge a model", "Train a defence", "The seven systems", "More")
    places += [readme.index(f"## {heading}") for heading in headings]
    assert places == sorted(places)
    for url in ("ossci-datasets.s3.amazonaws.com/mnist", "cs.toronto.edu/~kriz/cifar"):
        assert url in readme


def test_the_readme_names_all_extras_and_known_configs():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in setup["options.extras_require"]:
        assert f"`{extra}`" in PAGES["README.md"], extra
    rivals = PAGES["README.md"].partition("| system | configs | rivals |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", rivals)
    assert len(named) > 25
    assert set(named) <= set(configs.names())


def test_every_committed_record_says_where_it_comes_from():
    from jaxdefense.evaluation import records

    for record in records.load_all([ROOT / "experiments" / "records"]):
        assert record["versions"]["jax"]
        assert record["device"]["kind"]
        assert record["date"]
        for results in record["results"].values():
            for name, result in results.items():
                bits = records.unpack_bits(result["bits"], result["n"])
                assert 100 * bits.mean() == pytest.approx(result["accuracy"]), name
