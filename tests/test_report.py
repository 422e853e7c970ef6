"""Reports: rows are joined rightly, what records say is escaped, and Chromium shows the page."""

import copy
import json
import pathlib
import re
import shutil

import configs
import numpy as np
import pytest
import tables as script
from test_tables import changed, record

from jaxdefense.evaluation import records, report
from jaxdefense.evaluation.report import charts, papers, rows

RECORDS = pathlib.Path(__file__).parents[1] / "experiments" / "records"
# Bytes of a page: libraries and styles, the images of all galleries, and each row with its details
# and charts.
LIBRARIES, IMAGES, ROW = 1_800_000, 1_000_000, 15_000
EVIL = "</script><script>document.title='broken'</script><b>&"


def measured(accuracy, n=500):
    return {"accuracy": accuracy, "per_class": [accuracy, accuracy], "n": n}


def of_protocol(protocol, results, seed=0, **more):
    return record(seed, protocol=protocol, results={"main": results}, **more)


def curve():
    return [[float(epoch), 50.0 + epoch, 20.0 + epoch] for epoch in range(5)]


def rich_record():
    """A record with all that a row may show."""
    image = np.linspace(0, 1, 64).reshape(1, 8, 8, 1)
    counts = {"counts": [1, 0, 3], "edges": [-1.0, -0.3, 0.3, 1.0]}
    return of_protocol(
        "configured",
        {"clean": measured(90.0), "fgsm": measured(60.0), "pgd": measured(40.0)},
        training={"checkpoint": "best", "seconds": 120.0, "validation": curve()},
        parameters={"main": 1234},
        command=["python experiments/train.py --config=a:mnist"],
        reported={"pgd": {"value": 41.5, "status": "FOUND"}},
        weights={"before": {"conv1": {"histogram": counts}}},
        examples={
            "attack": "pgd",
            "labels": [3],
            "said": [8],
            "clean": records.pack_images(image),
            "adversarial": records.pack_images(np.clip(image + 0.1, 0, 1)),
        },
    )


class TestJoin:
    def test_protocols_of_one_config_share_a_row_and_seeds_are_averaged(self):
        found = [
            of_protocol("configured", {"clean": measured(90.0), "pgd": measured(50.0)}),
            of_protocol("configured", {"clean": measured(92.0), "pgd": measured(52.0)}, seed=1),
            of_protocol("autoattack", {"clean": measured(80.0, 100), "autoattack": measured(45.0)}),
        ]
        (row,) = rows.join(found)
        assert row.numbers["clean"].values == (90.0, 92.0)  # of more images than AutoAttack's
        assert row.numbers["pgd"].text == "51.00 ± 1.41 (2)"
        assert row.hardest == "autoattack"
        assert row.strength == rows.STRONG

    @pytest.mark.parametrize(
        "other",
        [
            changed("config.train.length", "8e"),
            changed("threat", {"norm": "linf", "eps": 0.2}),
            changed("training", {"checkpoint": "last"}),
            record(0),
        ],
        ids=["config", "threat", "checkpoint", "the same seed"],
    )
    def test_what_may_not_be_averaged_is_a_row_of_its_own(self, other):
        found = rows.join([record(0, training={"checkpoint": "best"}), other])
        assert [row.predictor for row in found] == ["main", "main", "teacher", "teacher"]

    def test_an_audit_adds_its_worst_case_and_not_its_tiers(self):
        tiers = {"clean": measured(90.0), "T1 pgd": measured(30.0), "worst": measured(20.0)}
        checks = [{"name": "deterministic", "passed": False, "evidence": "no"}]
        audit = {"main": {"checks": checks, "curve": [[0.0, 90.0], [0.3, 30.0]]}}
        (row,) = rows.join([of_protocol("audit", tiers, audit=audit)])
        assert list(row.numbers) == ["clean", rows.AUDIT]
        assert [line.attack for line in row.lines()] == list(tiers)
        assert row.hardest == rows.AUDIT
        assert [check["name"] for check in row.failed_checks] == ["deterministic"]

    def test_other_predictors_and_those_of_one_class_are_no_main_rows(self):
        one_class = {"pgd": {"accuracy": 70.0, "per_class": [70.0, None], "n": 57}}
        assert [row.main for row in rows.join([record(results={"main": one_class})])] == [False]
        whole = {"main": {"pgd": measured(1.0)}, "teacher": {"pgd": measured(2.0)}}
        assert [row.main for row in rows.join([record(results=whole)])] == [True, False]

    def test_a_row_without_results_makes_no_row(self):
        assert rows.join([record(results={})]) == []

    def test_the_same_record_twice_counts_once(self):
        one = rich_record() | {"training": {"validation": [[0.0, float("nan"), 1.0]]}}
        again = json.loads(json.dumps(one))  # as a run's folder and a collection hold it
        (row,) = rows.join([one, again])
        assert len(row.records) == 1
        assert "1 records" in report.leaderboard([one, again], title="x")

    def test_rows_of_one_name_are_told_apart(self):
        def judged(accuracy, n=500, **more):
            return of_protocol("configured", {"pgd": measured(accuracy, n)}, **more)

        def labels(*found):
            return [row.label for row in rows.join(found)]

        best, last = ({"training": {"checkpoint": kind}} for kind in ("best", "last"))
        assert labels(judged(1.0, **best)) == ["a"]
        assert labels(judged(1.0, **best), judged(2.0, **last)) == [
            "a (checkpoint best)",
            "a (checkpoint last)",
        ]
        assert labels(judged(1.0, 500), judged(1.0, 100)) == ["a (n 500)", "a (n 100)"]
        assert labels(judged(1.0), judged(2.0)) == ["a (no. 1)", "a (no. 2)"]
        other = judged(2.0, seed=1)
        other["config"]["train"]["length"] = "8e"
        assert labels(judged(1.0), other) == ["a (seed 0)", "a (seed 1)"]

    def test_what_is_not_finite_was_not_measured(self):
        found = {"clean": measured(90.0), "fgsm": measured(60.0), "pgd": measured(float("nan"))}
        (row,) = rows.join([of_protocol("configured", found)])
        assert list(row.numbers) == ["clean", "fgsm"]
        assert [line.attack for line in row.lines()] == ["clean", "fgsm"]


def system(name, protocol="configured", more=(), **accuracies):
    results = {column: measured(value) for column, value in accuracies.items()}
    return of_protocol(protocol, results, name=name, **dict(more))


def headline(*found):
    """The first sentences of a page, and its cautions."""
    page = report.leaderboard(found, title="x")
    lead = re.search(r'<p class="lead">(.*?)</p>', page, re.DOTALL)[1]
    return lead.replace("&#39;", "'"), re.search(r'<div class="caution">(.*?)</div>', page)[1]


class TestHeadline:
    def test_a_system_that_met_weak_attacks_alone_wins_nothing(self):
        weak = system("weak", fgsm=90.0)
        strong = system("strong", fgsm=60.0, pgd20=40.0)
        other = system("other", fgsm=70.0, pgd20=30.0)
        lead, _ = headline(weak, strong, other)
        assert "strong keeps the most of 2 of 3 systems" in lead
        assert "40.00 %, pgd20" in lead
        lead, _ = headline(weak, strong)  # no stronger attack in common
        assert "weak keeps the most of 2 systems under the attacks that they share" in lead
        assert "90.00 %, fgsm" in lead
        lead, _ = headline(system("weak", fgsm=50.0), strong)
        assert "60.00 %, fgsm, 500 images. Its own lowest is 40.00 %, pgd20." in lead

    def test_doubtful_numbers_are_left_out_and_said(self):
        checks = [{"name": "deterministic", "passed": False, "evidence": "no"}]
        audited = {"audit": {"main": {"checks": checks}}}
        broken = system("broken", "audit", audited, worst=95.0)
        flag = {"name": "zero gradients", "severity": "error", "evidence": "all"}
        masked = system("masked", "autoattack", {"cascade": {"flags": [flag]}}, autoattack=90.0)
        warning = flag | {"severity": "warning"}
        best = system("best", "autoattack", {"cascade": {"flags": [warning]}}, autoattack=50.0)
        note = {"cascade": {"flags": [flag | {"severity": "note"}]}}
        last = system("last", "autoattack", note, autoattack=40.0)
        lead, caution = headline(broken, masked, best, last)
        assert "best keeps the most of the 2 of 4 systems that met AutoAttack: 50.00 %" in lead
        assert "flags warn there that another attack may find more." in lead
        assert "Left out, because their numbers are doubtful: broken, masked." in (
            lead.replace("masked, broken", "broken, masked")
        )
        assert "Failed checks make these numbers doubtful: broken." in caution
        assert "no robust accuracies: masked." in caution
        assert "may find more: best." in caution
        lead, _ = headline(masked, best)
        assert "none is called the best" in lead

    def test_names_are_counted(self):
        one, two = (system("a", pgd=50.0 + i) for i in (0, 1))
        assert "none is called the best" in headline(one, two)[0]
        assert (
            "a (no. 2) keeps the most of 2 systems" in headline(one, two, system("b", pgd=1.0))[0]
        )


def test_the_front_is_what_no_point_beats():
    points = [(90.0, 40.0), (80.0, 60.0), (79.0, 50.0), (95.0, 10.0), (80.0, 60.0)]
    front = [points[i] for i in rows.pareto_front(points)]
    assert front == [(80.0, 60.0), (90.0, 40.0), (95.0, 10.0)]


def test_papers_come_from_the_defences_docstrings():
    paper = papers.find_paper({"config": {"defense": {"name": "trades"}}})
    assert paper.authors == "Zhang et al."
    assert paper.arxiv == "1901.08573"
    assert papers.find_paper({"config": {"defense": {"name": "../records"}}}) is None
    assert papers.find_paper({}) is None


class TestCommands:
    def test_seed_and_changed_values_are_in_the_lines(self):
        config = json.loads(configs.load("trades", "mnist").to_json())
        config |= {"seed": 1, "name": "trades-mnist-light"}
        config["train"]["length"] = "8e"
        config["defense"]["teacher"] = {"workdir": "/home/someone/runs/t"}
        train, judge, comment = configs.commands(config, protocol="autoattack")
        assert train == (
            "python experiments/train.py --config=trades:mnist "
            "--workdir=runs/trades-mnist-light-1 --config.name=trades-mnist-light "
            "--config.seed=1 --config.train.length=8e"
        )
        assert judge.endswith("--workdir=runs/trades-mnist-light-1 --protocol=autoattack")
        assert comment == '# not in the config file: defense.teacher.workdir = "runs/t"'

    def test_a_config_of_another_file_has_none(self):
        assert configs.commands({"name": "mine-mnist"}) == []
        assert configs.commands({}) == []


class TestCharts:
    def test_a_missing_number_is_no_mark(self):
        some = [rich_record(), of_protocol("configured", {"clean": measured(95.0)}, name="b")]
        assert charts.trade_off(rows.join(some)) is None  # one system with both numbers
        assert charts.training(rows.join([record()])) is None
        assert charts.histograms(rows.join([record()])[0]) is None
        spec = charts.histograms(rows.join(some)[0]).spec
        assert [value["share"] for value in spec["data"]["values"]] == [0.25, 0.75]

    def test_all_have_words(self):
        (row,) = rows.join([rich_record()])
        some = [row, *rows.join([rich_record() | {"name": "b"}])]
        made = [
            charts.trade_off(some),
            charts.classes(some),
            charts.training(some),
            charts.row_classes(row),
            charts.histograms(row),
            charts.over_eps({"a": [[0.0, 90.0], [0.3, 10.0]]}, 0.15),
        ]
        for chart in made:
            assert len(chart.spec["description"]) > 30
            assert chart.caption.endswith(".")

    def test_few_images_make_no_class(self):
        few = of_protocol("configured", {"clean": measured(90.0, 40), "pgd": measured(0.0, 40)})
        assert charts.classes(rows.join([few])) is None


@pytest.fixture(scope="module")
def page():
    found = [rich_record(), of_protocol("configured", {"clean": measured(70.0)}, name=EVIL)]
    found[1]["config"]["defense"]["name"] = EVIL
    other = of_protocol("autoattack", {"clean": measured(99.0), "autoattack": measured(80.0)})
    other["name"], other["config"]["dataset"]["name"] = "c", "digits"
    bad = {"c-2": f"Diverged {EVIL}"}
    return report.leaderboard([*found, other], title=EVIL, waiting=["w-1"], failed=bad)


def table_cells(page, name):
    """The texts of a row's cells."""
    body = page[page.index('<table id="leaderboard"') :]
    row = next(r for r in re.findall(r"<tr class.*?</tr>", body, re.DOTALL) if f">{name}<" in r)
    return [re.sub(r"<.*?>", " ", cell).split() for cell in re.findall(r"<td.*?</td>", row, re.S)]


class TestPage:
    def test_what_records_say_cannot_break_out(self, page):
        assert EVIL not in page
        assert "document.title='broken'" not in page.replace("&#39;", "")
        specs = re.search(r'id="charts">(.*?)</script>', page, re.DOTALL)[1]
        assert json.loads(specs)

    def test_it_loads_nothing(self, page):
        markup = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
        loads = re.findall(r"""<[^>]*\b(?:src|srcset|data|poster)\s*=\s*["']?([^"'\s>]+)""", markup)
        links = re.findall(r"<link[^>]*href=\"([^\"]*)", markup)
        assert links == ["data:,"]
        assert all(load.startswith("data:image/png") for load in loads if not load.startswith("c"))
        assert "@import" not in page
        assert not re.search(r"url\(\s*['\"]?(?!data:)[a-z]*:?//", page)

    def test_a_missing_number_is_a_dash(self, page):
        cells = table_cells(page, "c")
        assert ["–"] in cells
        assert ["80.00", "autoattack"] in cells
        assert all(cell in (["–"], []) for cell in table_cells(page, "w-1")[2:])

    def test_reported_beside_measured(self, page):
        assert ["40.00", "paper", "41.50", "FOUND"] in table_cells(page, "a")

    def test_nan_is_no_word_of_json(self):
        broken = rich_record()
        broken["training"]["validation"][0][1] = float("nan")
        specs = re.search(r'id="charts">(.*?)</script>', report.leaderboard([broken], title="x"))[1]
        json.loads(specs, parse_constant=lambda word: pytest.fail(word))

    def test_old_records_that_say_little_are_shown(self):
        bare = rich_record()
        del bare["seed"]
        audit = system("b", "audit", {"audit": {"main": {"examples": None}}}, worst=20.0)
        del audit["seed"]
        page = report.leaderboard([bare, audit], title="x")
        assert "2 records; –; versions –; git –; –; seeds –." in page
        assert table_cells(page, "b")[-8] == ["–", "worst", "case", "20.00"]
        verdict = report.audit_page(audit)
        assert "The record holds no checks" in verdict
        assert 'verdict good"' not in verdict

    def test_rows_of_one_name_keep_their_curves(self):
        curves = [[[0.0, 90.0], [0.3, value]] for value in (30.0, 40.0)]
        found = [
            system(
                "a", "audit", {"audit": {"main": {"checks": [], "curve": curve}}}, worst=20.0 + i
            )
            for i, curve in enumerate(curves)
        ]
        page = report.leaderboard(found, title="x")
        specs = json.loads(re.search(r'id="charts">(.*?)</script>', page, re.DOTALL)[1])
        ends = [
            {value["kind"] for value in spec["data"]["values"]}
            for spec in specs.values()
            if "over eps" in spec["description"]
        ]
        assert {"a (no. 1)", "a (no. 2)"} in ends

    def test_nothing_yet(self):
        empty = report.leaderboard([], title="x", waiting=["a", "b"])
        assert "Nothing has been measured yet." in empty
        assert empty.count('class="waiting"') == 2

    def test_galleries_stop_before_the_page_is_too_large(self, monkeypatch):
        monkeypatch.setattr(report, "_GALLERIES", 0)
        assert "images are left out here" in report.leaderboard([rich_record()], title="x")

    def test_absolute_paths_stay_private(self):
        found = rich_record()
        found["config"]["defense"]["teacher"]["workdir"] = "/home/someone/runs/t"
        assert "/home/someone" not in report.leaderboard([found], title="x")


def test_an_audit_s_page_begins_with_its_verdict():
    (one,) = records.load_all([RECORDS / "purifiers" / "ipg-mnist.json"])
    text = report.audit_page(one)
    lead = re.search(r'<p class="lead verdict bad">(.*?)</p>', text, re.DOTALL)[1]
    assert "1 of 12 checks failed: the number is not to be trusted" in lead
    assert "black box does not beat white box" in lead
    assert text.index("of 200 images under L∞ 0.3") < text.index("Accuracy by tier")
    assert "<small>class" not in text  # 20 images of each class
    sound = copy.deepcopy(one)
    for check in sound["audit"]["purified"]["checks"]:
        check["passed"] = True
    assert "No check of 12 failed." in report.audit_page(sound)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The page of all committed records, as experiments/tables.py --html makes it."""
    path = tmp_path_factory.mktemp("report") / "page.html"
    text = script.page([RECORDS], "Committed")
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium without a network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver: .ci/run installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    found.set_script_timeout(30)
    found.execute_cdp_cmd("Network.enable", {})
    offline = dict(offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    found.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield found
    found.quit()


# Resolves when the script of the page is done and every visible chart is drawn.
READY = """
const done = arguments[0];
(function wait() {
  const charts = [...document.querySelectorAll(".chart")].filter(
    (chart) => !chart.closest("details:not([open])")
  );
  const drawn = charts.every((chart) => chart.querySelector("svg"));
  document.documentElement.dataset.ready && drawn ? done() : setTimeout(wait, 50);
})();
"""
SYSTEMS = 'return [...document.querySelectorAll("#leaderboard td.system")].map(c => c.innerText)'


class TestBrowser:
    @pytest.fixture
    def opened(self, browser, committed):
        """The committed records' page; whatever a test does, the console stays empty."""
        browser.get(committed.as_uri())
        browser.execute_async_script(READY)
        yield browser
        assert browser.get_log("browser") == []

    def find(self, browser, selector):
        return browser.find_elements("css selector", selector)

    def test_size(self, committed):
        text = committed.read_text()
        galleries = "".join(re.findall(r'<table class="gallery">.*?</table>', text, re.DOTALL))
        images = sum(map(len, re.findall(r"data:image/png;base64,[\w+/=]*", galleries)))
        assert 0 < images <= IMAGES
        assert len(text) - images < LIBRARIES + ROW * text.count('<template id="detail')

    def test_it_opens_with_tables_and_charts(self, opened):
        assert opened.title == "Committed"
        labels = [e.get_attribute("aria-label") for e in self.find(opened, ".chart:has(svg)")]
        assert len(labels) >= 3
        assert any("Pareto front" in label for label in labels)

    def test_sort(self, opened):
        header = next(
            e for e in self.find(opened, "#leaderboard thead th") if e.text.strip() == "clean"
        )
        read = """return [...document.querySelectorAll("#leaderboard tbody tr")]
            .map((row) => +row.cells[4].dataset.order)"""
        header.click()
        rising = opened.execute_script(read)
        header.click()
        falling = opened.execute_script(read)
        assert len(rising) > 40
        assert rising == sorted(rising)
        assert falling == sorted(falling, reverse=True)

    def test_filter_and_search(self, opened):
        everything = opened.execute_script(SYSTEMS)
        choose = """
            document.querySelector("#filters [name=" + arguments[0] + "]").value = arguments[1];
            document.getElementById("filters").dispatchEvent(new Event("input"));
        """
        opened.execute_script(choose, "dataset", "digits")
        digits = opened.execute_script(SYSTEMS)
        assert 0 < len(digits) < len(everything)
        assert all("-digits" in name for name in digits)
        opened.execute_script(choose, "protocol", "audit")
        audited = opened.execute_script(SYSTEMS)
        assert 0 < len(audited) < len(digits)
        opened.execute_script(choose, "protocol", "")
        (search,) = self.find(opened, ".dt-search input")
        search.send_keys("trades")
        assert [name.split()[0] for name in opened.execute_script(SYSTEMS)] == ["trades-digits"]
        (others,) = self.find(opened, "#filters [name=others]")
        search.clear()
        search.send_keys("teacher")
        assert opened.execute_script(SYSTEMS) == []
        others.click()
        assert len(opened.execute_script(SYSTEMS)) >= 3

    def test_a_row_opens_and_closes(self, opened):
        button = opened.find_element("css selector", '[aria-label="Details of ipg-digits"]')
        opened.execute_script("arguments[0].click()", button)
        opened.execute_async_script(READY)
        (detail,) = self.find(opened, "td.detail")
        assert button.get_attribute("aria-expanded") == "true"
        assert "--config=ipg:digits" in detail.text
        assert len(detail.find_elements("css selector", ".chart svg")) >= 2
        pictures = detail.find_elements("css selector", ".gallery img")
        assert len(pictures) == 24  # clean, adversarial, difference, purified
        assert all(p.get_property("naturalWidth") == 8 for p in pictures)
        assert all(p.get_attribute("alt") for p in pictures)
        opened.execute_script("arguments[0].click()", button)
        assert not self.find(opened, "td.detail")

    @pytest.mark.slow
    def test_narrow_and_dark(self, opened, committed):
        size = dict(width=400, height=900, deviceScaleFactor=1, mobile=True)
        media = dict(features=[dict(name="prefers-color-scheme", value="dark")])
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        try:
            opened.get(committed.as_uri())
            opened.execute_async_script(READY)
            assert opened.execute_script("return document.documentElement.scrollWidth") == 400
            paper = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert paper == "rgb(20, 23, 26)"
            wide = [e.size["width"] for e in self.find(opened, ".chart svg")]
            assert wide
            assert max(wide) <= 400
        finally:
            opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    @pytest.mark.parametrize(
        ("done", "failed", "waiting"),
        [(0, 0, 2), (0, 2, 0), (1, 1, 1)],
        ids=["only waiting", "only failed", "mixed"],
    )
    def test_rows_without_a_record_are_sorted_and_searched_too(
        self, browser, tmp_path, done, failed, waiting
    ):
        path = tmp_path / "early.html"
        text = report.leaderboard(
            [rich_record()][:done],
            title="early",
            waiting=[f"waiting-{i}" for i in range(waiting)],
            failed={f"failed-{i}": "Diverged" for i in range(failed)},
        )
        path.write_text(text, encoding="utf-8")
        browser.get(path.as_uri())
        browser.execute_async_script(READY)
        shown = browser.execute_script(SYSTEMS)
        assert len(shown) == done + failed + waiting
        for header in self.find(browser, "#leaderboard thead th")[1:5]:
            browser.execute_script("arguments[0].click()", header)
        (search,) = self.find(browser, ".dt-search input")
        search.send_keys(shown[-1].split()[0])
        assert browser.execute_script(SYSTEMS) == shown[-1:]
        assert browser.get_log("browser") == []

    def test_a_long_name_leaves_a_telephone_s_page_narrow(self, browser, tmp_path):
        path, name = tmp_path / "long.html", "x" * 120
        some = [rich_record() | {"name": name}, rich_record()]
        path.write_text(report.leaderboard(some, title=name), encoding="utf-8")
        size = dict(width=400, height=900, deviceScaleFactor=1, mobile=True)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            browser.get(path.as_uri())
            browser.execute_async_script(READY)
            assert browser.execute_script("return document.documentElement.scrollWidth") == 400
            heads = [e.text.strip() for e in self.find(browser, "#leaderboard thead th")]
            assert heads[1:4] == ["system", "clean", "hardest attack"]
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_a_name_that_is_markup_stays_text(self, browser, page, tmp_path):
        path = tmp_path / "evil.html"
        path.write_text(page, encoding="utf-8")
        browser.get(path.as_uri())
        browser.execute_async_script(READY)
        assert browser.title == EVIL
        assert browser.get_log("browser") == []
