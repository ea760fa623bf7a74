"""The report that is handed over: what it holds, that nothing of the data is taken for markup, and how it
looks in a browser.
"""

import html
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from test_cli import one_error, run

from attnfit import SoftmaxRegressor, datasets
from attnfit.inference import tables

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LATEX = shutil.which("pdflatex")
EVIL = "<script>alert(1)</script> & \\textbf{x} | `$_%#~^{}"
FORMULA = "choice ~ gc + ttme + C(mode) + hinc:C(mode)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert run("example", "travel", "--output", folder / "travel.csv").exit_code == 0
    travel = pd.read_csv(folder / "travel.csv")
    travel["party"] = travel.traveller // 7
    travel["never"] = ((travel["mode"] == 3) & (travel.ttme == 53)) * (1 - travel.choice)
    travel.to_csv(folder / "travel.csv", index=False)
    travel.rename(columns={"gc": EVIL}).to_csv(folder / "evil.csv", index=False)
    return folder


def written(folder, ending, *options, data="travel.csv"):
    path = folder / f"report{ending}"
    result = run("fit", "softmax", folder / data, "--group", "traveller", *options, "--report", path)
    return path.read_text(), result


def as_text(page):
    return html.unescape(re.sub("<[^>]*>", " ", page))


@pytest.mark.parametrize("ending", [".html", ".md", ".tex"])
def test_everything_is_there(folder, ending):
    options = ("--formula", FORMULA, "--cluster", "party", "--holdout", "0.2", "--cv", "3", "--level", "0.9")
    text, result = written(folder, ending, *options)
    assert result.exit_code == 0, result.output
    text = as_text(text) if ending == ".html" else text.replace("\\", "")
    if ending == ".tex":
        text = text.replace("$-$", "-").replace("{}", "")
    frame = pd.read_csv(folder / "travel.csv")
    parties = np.unique(frame.party.astype(str))
    out = parties[np.random.default_rng(0).permutation(31)[:6]]
    model = SoftmaxRegressor.from_formula(
        FORMULA,
        frame[~frame.party.astype(str).isin(out)],
        "traveller",
        clusters="party",
        loss="cross_entropy",
    )
    _, cells = model.summary(level=0.9).cells()
    for cell in (cell for row in cells for cell in row[1:4]):
        assert cell in text
    for told in (
        "The fit has converged", "travel.csv", "SoftmaxRegressor", "90", "cluster (party), 25 units",
        "mode: reference level 1", "Held out 6 of 31 clusters", "3 folds of clusters", "hit rate", "AIC",
        "all slopes are zero (Wald)", "mode: 6 coefficients are zero (Wald)", "--holdout 0.2", "attnfit 0",
        "SHA-256", f"{model.fit_statistics().log_likelihood:.7g}",
    ):  # fmt: skip
        assert told.replace(" ", "") in re.sub(r"[\s&|]", "", text), told
    # A likelihood ratio would take every row for one draw, which clustered errors do not.
    assert "likelihood ratio" not in text
    test = model.wald_test(np.eye(8))
    assert f"{test.statistic:.6g}" in text


def test_likelihood_ratio_against_none(folder):
    text, _ = written(folder, ".md", "--formula", "choice ~ gc + ttme + C(mode)")
    model = SoftmaxRegressor("cross_entropy").fit(
        datasets.load_travel_mode().A[:, :5], datasets.load_travel_mode().b,
        groups=datasets.load_travel_mode().groups,
    )  # fmt: skip
    statistic = 2.0 * (model.log_likelihood_ + 210 * np.log(4))
    assert f"likelihood ratio) | {statistic:.6g} | chi2(5)" in text


@pytest.mark.filterwarnings("ignore")
def test_separation_stands_at_the_top(folder):
    text, result = written(folder, ".md", "--target", "choice", "--features", "gc,ttme,never")
    assert result.exit_code == 1
    head = text[: text.index("## Data and model")]
    assert "The fit ended as separable" in head and "No finite value: never" in head
    page, _ = written(
        folder, ".html", "--target", "choice", "--features", "gc,ttme,never", "--separation", "drop"
    )
    assert 'class="verdict"' in page and "left out" in as_text(page) and "no finite value" in page


def test_words_of_the_data_are_no_markup(folder):
    options = ("--target", "choice", "--features", f'"{EVIL}",ttme')
    page, result = written(folder, ".html", *options, data="evil.csv")
    assert result.exit_code == 0, result.output
    assert "<script" not in page and html.escape(EVIL, quote=False) in page.replace("&#34;", '"')
    text, _ = written(folder, ".md", *options, data="evil.csv")
    table = text[text.index("## Coefficients") : text.index("## How well")]
    assert r"\<script\>alert(1)\</script\>" in table and r"\|" in table
    tex, _ = written(folder, ".tex", *options, data="evil.csv")
    assert r"\textbackslash{}textbf\{x\} | \textasciigrave{}\$\_\%\#\textasciitilde{}" in tex
    assert r"\textasciicircum{}\{\}" in tex and r"\textbf{x}" not in tex and "--" not in tex


def compiled(path, folder):
    """What LaTeX printed and logged, as bytes: it breaks lines within letters."""
    command = [LATEX, "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={folder}", path]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout + (folder / path.with_suffix(".log").name).read_bytes()


@pytest.mark.skipif(LATEX is None, reason="no LaTeX on this machine: apt-get install texlive")
def test_latex_compiles(folder, tmp_path):
    names = {"gc": EVIL, "ttme": "--a,,b ``c'' naïve"}
    pd.read_csv(folder / "travel.csv").rename(columns=names).to_csv(folder / "odd.csv", index=False)
    options = ("--target", "choice", "--exclude", "party,never", "--holdout", "0.2", "--se", "robust")
    _, result = written(folder, ".tex", *options, data="odd.csv")
    assert result.exit_code == 0, result.output
    told = compiled(folder / "report.tex", tmp_path)
    assert b"2 pages" in told and b"Overfull" not in told and b"Missing character" not in told


@pytest.mark.skipif(LATEX is None, reason="no LaTeX on this machine: apt-get install texlive")
def test_a_table_compiles_in_a_document_of_ones_own(tmp_path):
    path = tmp_path / "own.tex"
    table = tables.latex(["", "a"], [[EVIL, "-1"], ["\"--'", "-2.5e-07"]], [EVIL])
    assert "$-$2.5e-07" in table
    path.write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + table + "\n\\end{document}"
    )
    assert b"1 page" in compiled(path, tmp_path)


def test_reports_are_the_same_twice(folder):
    options = ("--formula", "choice ~ gc")
    one, other = (written(folder, ".html", *options)[0] for _ in range(2))
    assert one == other


def test_streams_get_html(folder):
    result = run("fit", "softmax", folder / "travel.csv", "--formula", "choice ~ gc", "--report", "-")
    assert result.stdout.startswith("<!doctype html>") and "certified within" in result.stderr


def test_without_matplotlib_or_jinja(folder, monkeypatch):
    monkeypatch.setattr("attnfit.cli.handover.find_spec", lambda name: None if name == "matplotlib" else 1)
    page, _ = written(folder, ".html", "--formula", "choice ~ gc")
    assert "<svg" not in page and "Pictures need matplotlib" in page
    monkeypatch.setattr("attnfit.cli.handover.find_spec", lambda name: None)
    result = run("fit", "softmax", folder / "travel.csv", "--formula", "choice ~ gc", "--report", "r.html")
    assert "--report needs jinja2" in one_error(result)


# ---- in a browser ------------------------------------------------------------------------------------------


def browse(profile, *arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    flags += ["--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
    done = subprocess.run([BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What reaches beyond the right edge of the window, or is cut off by what it stands in.
BEYOND = """<script>
const beyond = one => one.getBoundingClientRect().right > innerWidth + 1;
const cut = one => one.clientWidth && one.scrollWidth > one.clientWidth + 1;
const all = [...document.querySelectorAll('body *')].filter(one => !one.closest('svg *'));
document.title = innerWidth + ':' + all.filter(one => beyond(one) || cut(one)).map(one => one.tagName);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_off_screen(folder, tmp_path, width):
    name = "a_name_without_any_place_to_break_that_goes_on_" * 2
    data = pd.read_csv(folder / "travel.csv").rename(columns={"gc": name})
    data.to_csv(folder / "long.csv", index=False)
    page, result = written(folder, ".html", "--formula", f"choice ~ {name} + C(mode)", data="long.csv")
    assert result.exit_code == 0
    path = tmp_path / "report.html"
    path.write_text(
        page.replace("default-src 'none'", "script-src 'unsafe-inline'").replace("</body>", BEYOND)
    )
    # A window has a least width; a frame has none.
    frame = tmp_path / "frame.html"
    read = "document.title = document.querySelector('iframe').contentDocument.title"
    frame.write_text(f'<iframe src="report.html" width="{width}" height="900" onload="{read}"></iframe>')
    dom = browse(
        tmp_path / "profile", "--allow-file-access-from-files", "--window-size=1400,1000", "--dump-dom",
        frame.as_uri(),
    )  # fmt: skip
    assert re.search("<title>(.*?)</title>", dom)[1] == f"{width}:"


def test_jinja_comes_with_the_command_line():
    code = "import sys; import attnfit.cli.app; print('jinja2' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
