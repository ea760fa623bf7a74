"""The page in a real browser: it renders, sorts, filters and hides; nothing is fetched."""

import json
import re
import shutil
import struct
import subprocess
import zlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from audit_reports import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: apt-get install chromium"
)
FLAGS = [
    *["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"],
    *["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"],
    *("--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"),
]


def browse(profile, *arguments):
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "out.html"
    report().to_html(path, redact=False)
    return path.as_uri()


def rows(dom, table):
    """The cells of the rows that are shown, as text."""
    body = re.search(rf'<table class="sortable" id="{table}">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    shown = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for row in shown]


def test_it_shows_everything_and_hides_recovered_text(page, tmp_path):
    dom = browse(tmp_path, "--dump-dom", page)
    assert '<body class="redacted">' in dom
    assert len(rows(dom, "pairs")) == 11
    assert "<mark>" in dom


def test_recovered_text_is_shown_when_asked_for(page, tmp_path):
    dom = browse(tmp_path, "--dump-dom", f"{page}#show=")
    assert "redacted" not in re.search("<body.*?>", dom)[0]


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_tables_sort_by_number_with_unknown_last(page, tmp_path, order):
    shown = rows(browse(tmp_path, "--dump-dom", f"{page}#sort=pairs:3:{order}"), "pairs")
    shares = [row[3] for row in shown]
    assert shares[-2:] == ["–", "–"]
    numbers = [float(share.removesuffix(" %")) for share in shares[:-2]]
    assert numbers == sorted(numbers, reverse=order == "descending")


def test_tables_filter_by_words(page, tmp_path):
    dom = browse(tmp_path, "--dump-dom", f"{page}#filter=pairs:INT8+topk")
    assert [row[:2] for row in rows(dom, "pairs")] == [["topk:5", "int8"]]
    assert "1 of 11 rows" in dom


def test_a_click_sorts(page, tmp_path):
    """The same page with a script that clicks, under a policy that allows it."""
    source = tmp_path / "clicked.html"
    report().to_html(source, redact=False)
    text = re.sub("script-src [^;]*;", "script-src 'unsafe-inline';", source.read_text())
    click = "<script>document.querySelectorAll('#pairs th button')[3].click()</script></body>"
    source.write_text(text.replace("</body>", click))
    dom = browse(tmp_path / "profile", "--dump-dom", source.as_uri())
    assert 'aria-sort="descending"' in dom
    assert rows(dom, "pairs")[0][3] == "100 %"


def asked_for(log):
    """Addresses that a page asked for; the browser's own errands have no page behind them."""
    events = json.loads(log.read_text())["events"]
    told = [event["params"] for event in events if isinstance(event.get("params"), dict)]
    return [
        one["url"]
        for one in told
        if "url" in one and one.get("initiator", "not an origin") != "not an origin"
    ]


def test_nothing_is_fetched(page, tmp_path):
    browse(tmp_path / "profile", f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom", page)
    assert [url for url in asked_for(tmp_path / "net.json") if not url.startswith("file:")] == []


def test_a_page_that_fetches_is_noticed(tmp_path):
    (tmp_path / "bad.html").write_text('<img src="http://elsewhere.invalid/x.png">')
    log = tmp_path / "net.json"
    browse(tmp_path / "profile", f"--log-net-log={log}", "--dump-dom", (tmp_path / "bad.html").as_uri())
    assert "http://elsewhere.invalid/x.png" in asked_for(log)


def test_the_policy_stops_what_is_smuggled_in(tmp_path):
    source = tmp_path / "smuggled.html"
    report().to_html(source, redact=False)
    evil = "<script>document.title = 'owned'</script></body>"
    source.write_text(source.read_text().replace("</body>", evil))
    dom = browse(tmp_path / "profile", "--dump-dom", source.as_uri())
    assert "<title>attnfit audit" in dom


def test_a_picture_has_colours_where_the_heat_map_is(page, tmp_path):
    picture = tmp_path / "shot.png"
    browse(tmp_path / "profile", "--window-size=1000,1400", f"--screenshot={picture}", page)
    width, height, pixels = read_png(picture)
    assert (width, height) == (1000, 1400)
    # The darkest and the lightest step of the scale, both of which are in the report.
    assert pixels[(0x5C, 0x10, 0x0F)] > 500
    assert pixels[(0xF7, 0xFB, 0xFF)] > 500
    assert len(pixels) > 20


def read_png(path):
    """Return the size of a picture and how often each colour occurs: eight bits, no interlacing."""
    data = path.read_bytes()
    at, body = 8, b""
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", chunk[:10])
        body += chunk if kind == b"IDAT" else b""
        at += 12 + length
    assert depth == 8 and colour in (2, 6)
    size = 3 if colour == 2 else 4
    return width, height, count_colours(zlib.decompress(body), width, size)


def count_colours(raw, width, size):
    import numpy as np

    stride = width * size
    rows = np.frombuffer(raw, np.uint8).reshape(-1, stride + 1)
    before, colours = np.zeros(stride, np.uint8), {}
    for row in rows:
        line = unfilter(int(row[0]), row[1:], before, size)
        for pixel, count in zip(
            *np.unique(line.reshape(-1, size)[:, :3], axis=0, return_counts=True), strict=True
        ):
            key = tuple(int(part) for part in pixel)
            colours[key] = colours.get(key, 0) + int(count)
        before = line
    return colours


def unfilter(kind, row, before, size):
    import numpy as np

    if kind == 0:
        return row.copy()
    if kind == 2:
        return row + before
    line = row.copy()
    if kind == 1:
        return np.cumsum(line.reshape(-1, size), axis=0, dtype=np.uint8).reshape(-1)
    values, above = line.astype(int).tolist(), before.astype(int).tolist()
    for i in range(len(values)):
        left, up = (values[i - size] if i >= size else 0), above[i]
        corner = above[i - size] if i >= size else 0
        if kind == 3:
            values[i] = (values[i] + (left + up) // 2) % 256
        else:
            guess = left + up - corner
            nearest = min(
                (abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner)
            )
            values[i] = (values[i] + nearest[2]) % 256
    return np.array(values, dtype=np.uint8)
