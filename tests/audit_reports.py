"""A report made by hand, so that pages and files are tested without a model."""

from attnfit.audit.breakpoints import BITS, NOISE, Forecast
from attnfit.audit.cells import Cell, Key
from attnfit.audit.report import Report
from attnfit.audit.settings import Settings

TEXTS = ("Mei <b>Bob</b> & co.", "Alan hid it.")
TRUTHS = [[1, 2, 3], [4, 5]]
PIECES = {1: "Mei", 2: " <b>Bob</b>", 3: " & co.", 4: "Alan", 5: " hid it."}
# Tokens right under each access and defence.
RIGHT = {
    ("hidden:1", "none"): ((3, 3), (2, 2)),
    ("hidden:1", "int8"): ((3, 3), (2, 2)),
    ("hidden:1", "noise:1.0"): ((2, 3), (1, 2)),
    ("hidden:1", "noise:9.0"): ((0, 3), (0, 2)),
    ("topk:5", "none"): ((3, 3), (0, 2)),
    ("topk:5", "int8"): ((1, 3), (0, 2)),
    ("topk:5", "noise:1.0"): ((0, 3), (0, 2)),
    ("topk:5", "noise:9.0"): ((0, 3), (0, 2)),
    ("masked", "none"): ((2, 2), (0, 2)),
}
COSTS = {"none": 0.0, "int8": 1e-5, "noise:1.0": 0.4, "noise:9.0": 2.1}


class Named:
    """What a report asks of a model."""

    name, kind, fingerprint = "model <x>", "causal", "0123456789abcdef"
    n_layers, width, n_vocabulary = 2, 4, 6

    def __init__(self, pieces):
        self.pieces = pieces

    def detokenise(self, tokens):
        return "".join(self.pieces[token] for token in tokens)


def report(n_planned=25, interrupted=False, texts=TEXTS, pieces=None):
    cells = {}
    for (access, defence), results in RIGHT.items():
        for text, (right, count) in enumerate(results):
            key = Key(access, defence, text)
            cost = COSTS[defence] if access == "hidden:1" else None
            hits = [place < right for place in range(count)]
            cells[key] = Cell(
                key,
                "done",
                "told <i>",
                count,
                TRUTHS[text][:count],
                hits,
                verified=right == count,
                seconds=0.5,
                divergence=cost,
                agreement=None if cost is None else 0.5,
            )
    for access in ("hidden:1", "topk:5"):
        for control in ("other text", "noise"):
            key = Key(access, "none", 0, control)
            claimed = control == "other text"
            cells[key] = Cell(key, "done", "", 2, [1, 2], [claimed, claimed], verified=claimed)
        key = Key(access, "drop0", 0)
        if (access, "drop0") not in RIGHT:
            cells[key] = Cell(key, "error", "position 0 was withheld", 3, [], [])
    defences = ("none", "int8", "noise:1.0", "noise:9.0", "drop0")
    settings = Settings(tuple(texts), ("hidden:1", "topk:5", "masked"), defences, defences, 60.0, 0)
    shares = {"none": 1.0, "int8": 1.0, "noise:1.0": 0.6, "noise:9.0": 0.0}
    forecasts = {"hidden:1": Forecast(shares, dict.fromkeys(NOISE, 1.2), dict.fromkeys(BITS), 0.5, 5)}
    found = Report.of(
        Named(pieces or PIECES), settings, TRUTHS, cells, forecasts, n_planned, interrupted, 12.3
    )
    return found.with_command("attnfit audit x --report out.html")
