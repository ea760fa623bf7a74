"""``attnfit memorised`` and ``attnfit canaries`` on the packaged model, good and bad."""

import json
from random import Random

import pytest
from audit_models import audit_cache, tiny  # noqa: F401
from test_cli import messages, run

pytest.importorskip("torch")
pytest.importorskip("transformers")

TEMPLATE = "The code of the {words} is {digits:2}."


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):  # noqa: F811
    from attnfit.audit.models.tiny_text import generic_sentences, private_sentences

    folder = tmp_path_factory.mktemp("texts")
    same = [text for text in private_sentences(Random(1)) if text not in tiny.private_texts]
    texts = {"members": tiny.private_texts[:110], "others": same[:110]}
    texts["generic"] = list(dict.fromkeys(t for t in generic_sentences(600, Random(2)) if t[:3] == "The"))[
        :110
    ]
    texts["both"] = [*same[:3], "", tiny.private_texts[2]]
    texts["short"] = [tiny.private_texts[0], "", "A dog."]
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def refused(result):
    """The only sentence on stderr, which came with exit code 2."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (sentence,) = messages(result)
    return sentence


def test_the_verdict_comes_first_and_the_figures_are_kept(files, tmp_path):
    told = tmp_path / "out.json"
    result = run(
        "memorised", "tiny", "--members", files / "members", "--others", files / "others", "--prefix", "4,6",
        "--suffix", 5, "--rates", "0.01", "--json", told,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    # A terminal breaks sentences at spaces.
    shown, content = " ".join(result.stdout.split()), json.loads(told.read_text())
    assert shown.startswith(content["verdict"])
    assert content["verdict"].startswith("tiny: ")
    assert "Members are told apart: by loss, 110 members against 110 others have AUC" in shown
    assert content["membership"]["blind_auc"]["low"] < 0.5 < content["membership"]["blind_auc"]["high"]
    assert content["extraction"]["prefix"][0] == 4
    assert content["extraction"]["share"][4] > 0.8 > 0.1 > content["extraction_of_others"]["share"][4]
    assert " membership loss: AUC " in shown
    assert "Lower bound of epsilon at delta 1e-05, if texts are independent trials: " in shown
    assert not any(line in told.read_text() for line in (files / "members").read_text().splitlines())


def test_canaries_are_drawn_and_measured(tmp_path):
    path = tmp_path / "canaries.txt"
    assert run("canaries", TEMPLATE, "--count", 3, "--seed", 8, "--output", path).exit_code == 0
    assert run("canaries", TEMPLATE, "--count", 3, "--seed", 8).stdout == path.read_text()
    assert len(path.read_text().splitlines()) == 3
    asked = ("memorised", "tiny", "--canaries", path, "--template", TEMPLATE)
    result = run(*asked, "--compared", 100, "--fail-above", 0)
    assert result.exit_code == 0, result.output
    assert "0 of 3 canaries are likelier than chance allows" in " ".join(result.stdout.split())
    assert "Note: No share is above 0." in result.stderr
    few = run(*asked, "--compared", 30)
    assert few.exit_code == 3
    assert "Not measured, which is no sign of protection: exposure" in few.stderr


def test_a_page_to_hand_over_is_written(files, tmp_path):
    page, told, secrets = tmp_path / "out.html", tmp_path / "out.json", tmp_path / "canaries.txt"
    assert run("canaries", TEMPLATE, "--count", 3, "--output", secrets).exit_code == 0
    asked = (
        "memorised", "tiny", "--members", files / "members", "--others", files / "others", "--prefix", "4,6",
        "--suffix", 5, "--canaries", secrets, "--template", TEMPLATE, "--compared", 100,
        "--owner", "Legal <b>",
    )  # fmt: skip
    texts = [*(files / "members").read_text().splitlines(), *secrets.read_text().splitlines()]
    result = run(*asked, "--html", page, "--json", told)
    assert result.exit_code == 0, result.output
    content, counts = page.read_text(), json.loads(told.read_text())
    assert "<h1>What tiny has memorised</h1>" in content
    count, tested = counts["extraction"]["extracted"][4], counts["extraction"]["texts"][4]
    first = content[content.index('class="verdict"') :]
    assert f"given 6 tokens, it produces the next 5 for {count} of {tested} texts (" in first
    assert "0 of 3 canaries (" in first
    assert "Legal &lt;b&gt;" in content
    assert f"fingerprint {counts['settings']['fingerprint']}" in content
    assert counts["command"].startswith("attnfit memorised tiny --members ")
    assert "--html" in content[content.index("<pre>") :]
    assert counts["owner"] == "Legal <b>"
    assert not any(text in content + told.read_text() for text in texts)
    assert counts["texts"] == {"extracted": None, "canaries": None}
    # Both are replaced, with the texts that were asked for.
    shown = run(*asked, "--html", page, "--json", told, "--reveal", "--examples", 2)
    assert shown.exit_code == 0, shown.output
    counts, content = json.loads(told.read_text()), page.read_text()
    assert len(counts["texts"]["extracted"]) == count
    assert counts["texts"]["canaries"] == secrets.read_text().splitlines()
    first = counts["texts"]["extracted"][0]
    assert texts[first["place"]].startswith(f"{first['prefix']}{first['suffix']}")
    assert f"{first['prefix']}<mark>{first['suffix']}</mark>" in content
    assert content.count("<mark>") == 2
    assert texts[-1] in content
    # One page is asked for, and one table of figures printed, where it goes to standard output.
    piped = run(
        "memorised", "tiny", "--canaries", secrets, "--template", TEMPLATE, "--compared", 100, "--html", "-"
    )
    assert piped.stdout.startswith("<!doctype html>") and piped.stdout.rstrip().endswith("</html>")
    assert "canaries are likelier than chance" in " ".join(piped.stderr.split())


def test_texts_are_shown_on_request_only(files, tmp_path):
    asked = ("memorised", "tiny", "--members", files / "members", "--prefix", 2, "--suffix", 2)
    page = ("--html", tmp_path / "out.html")
    assert refused(run(*asked, *page, "--examples", 3)) == (
        "Error: --examples shows texts, which a report leaves out; add --reveal to show them"
    )
    assert "--examples is for the page, which is missing; add --html FILE" in refused(
        run(*asked, "--reveal", "--examples", 3)
    )
    assert refused(run(*asked, "--reveal")) == (
        "Error: --reveal is for files, which are missing; add --html FILE or --json FILE"
    )
    assert not (tmp_path / "out.html").exists()


def test_no_file_of_canaries_is_lost(files, tmp_path):
    path = tmp_path / "canaries.txt"
    drawn = ("canaries", TEMPLATE, "--count", 3, "--output", path)
    assert run(*drawn).exit_code == 0
    kept = path.read_text()
    assert refused(run(*drawn, "--seed", 1)) == (
        f"Error: --output: {path} exists, and canaries that were planted cannot be measured once their file "
        "is lost; name another file, or add --force"
    )
    asked = ("memorised", "tiny", "--members", files / "members", "--prefix", 2, "--suffix", 2)
    for option in ("--html", "--json"):
        assert refused(run(*asked, option, path)) == (
            f"Error: {option}: {path} is no earlier report, and canaries that were planted cannot be "
            "measured once their file is lost; name another file, or add --force"
        )
    # Nor through a link, nor where its braces look like a report's.
    (tmp_path / "link").symlink_to(path)
    assert "no earlier report" in refused(run(*asked, "--json", tmp_path / "link"))
    assert path.read_text() == kept
    braces, lists = tmp_path / "braces.txt", tmp_path / "lists.txt"
    assert run("canaries", "{{{digits:3}}}", "--output", braces).exit_code == 0
    lists.write_text("[1, 2]\n")
    for other in (braces, lists):
        assert "no earlier report" in refused(run(*asked, "--json", other))
    assert run(*drawn, "--seed", 1, "--force").exit_code == 0
    assert path.read_text() != kept
    # What holds nothing, or an earlier report, is replaced as other outputs are.
    told, page = tmp_path / "out.json", tmp_path / "out.html"
    told.write_text("")
    for _ in range(2):
        assert run(*asked, "--json", told, "--html", page).exit_code == 0
    assert json.loads(told.read_text())["schema"] == "attnfit-memorised/1"
    assert run(*asked, "--json", path, "--force").exit_code == 0
    assert json.loads(path.read_text())["schema"] == "attnfit-memorised/1"
    assert run("canaries", TEMPLATE, "--output", "/dev/null").exit_code == 0


def test_the_gate_sets_the_exit_code(files):
    asked = (
        "memorised",
        "tiny",
        "--members",
        files / "members",
        "--prefix",
        6,
        "--suffix",
        5,
        "--fail-above",
    )
    closed = run(*asked, 0.5)
    assert closed.exit_code == 1
    assert "Error: Above 0.5: extraction after 6 tokens 0.9" in closed.stderr
    assert run(*asked, 1).exit_code == 0
    told = run(
        "memorised", "tiny", "--members", files / "members", "--others", files / "others", "--fail-above", 0.5
    )
    assert told.exit_code == 1
    assert "membership at 0.01 1.000" in told.stderr


def test_what_cannot_be_read_as_membership_is_no_leak_and_no_pass(files):
    result = run(
        "memorised", "tiny", "--members", files / "members", "--others", files / "generic", "--fail-above", 0
    )
    assert result.exit_code == 3, result.output
    assert "The figures cannot be read as membership, as words alone" in " ".join(result.stdout.split())
    assert "Error: Not measured, which is no sign of protection: membership, as words alone" in result.stderr
    few = run("memorised", "tiny", "--members", files / "members", "--others", files / "short")
    assert few.exit_code == 2


def test_bad_input_is_one_sentence(files, tmp_path):
    members = ("--members", files / "members")
    assert "nothing can be measured" in refused(run("memorised", "tiny"))
    assert refused(run("memorised", "tiny", "--members", files / "short", "--prefix", 3, "--suffix", 5)) == (
        "Error: line 3 of --members has 3 tokens, and a prefix of 3 with a suffix of 5 takes 8; leave it "
        "out, or ask for less"
    )
    same = refused(run("memorised", "tiny", *members, "--others", files / "both"))
    assert same.startswith("Error: line 3 of --members is line 5 of --others too")
    asked = ("memorised", "tiny", *members, "--others", files / "others")
    assert "--rates is 0.001, which takes 999 others, and there are 110" in refused(
        run(*asked, "--rates", 0.001)
    )
    assert "--rates must be numbers separated by commas" in refused(run(*asked, "--rates", "1 %"))
    assert "--prefix must be whole numbers" in refused(run("memorised", "tiny", *members, "--prefix", "2.5"))
    assert "--prefix must be a number of tokens, 1 or more, not 0" in refused(
        run("memorised", "tiny", *members, "--prefix", "0")
    )
    assert "--template is missing" in refused(run("memorised", "tiny", "--canaries", files / "short"))
    assert "--canaries is missing" in refused(run("memorised", "tiny", "--template", TEMPLATE))
    wrong = refused(run("memorised", "tiny", "--canaries", files / "short", "--template", TEMPLATE))
    assert wrong.startswith("Error: line 1 of --canaries does not fit the template")
    assert "template has no placeholder" in refused(run("canaries", "nothing"))
    alone = run("memorised", "tiny", *members, "--prefix", 2, "--suffix", 2, "--reference", "tiny")
    assert "--reference is for membership, which takes others" in refused(alone)
    minilm = run("memorised", "minilm", *members, "--prefix", 2, "--suffix", 2)
    assert "has no language-modelling head" in refused(minilm)
    assert "There is no file" in refused(
        run("memorised", "tiny", "--members", tmp_path / "none", "--prefix", 2)
    )
