import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from recoup.validate import Cost, Gate, Report, Rung, Samples, html, markdown, outcome_of, write
from recoup.validate.report import duration, size
from recoup.validate.symptoms import Symptom
from recoup.validate.tries import Retuned, Try

HOSTILE = "<script>alert('$x$')</script> | `&\"--> \\"
VOID = {"meta", "br", "hr", "img", "link", "input"}
RANDOM = np.random.default_rng(0)
LOSS = RANDOM.normal(2.0, 0.3, size=300)
TAIL = np.arange(300) < 60
GATES = [Gate("perplexity", max_increase="2%"), Gate("perplexity", slice="rare", max_increase="4%")]


def rung(name, worse):
    def samples(values):
        return Samples({"perplexity": values}, slices={"rare": TAIL})

    candidate = samples(LOSS + worse + RANDOM.normal(0.0, 0.01, size=300))
    verdicts = [gate.check(samples(LOSS), candidate) for gate in GATES]
    return Rung(
        name=name,
        metrics=candidate.summary(),
        verdicts=verdicts,
        seconds=4.2,
        outcome=outcome_of(verdicts),
    )


RTN, QAT, EXPORTED = rung("rtn", 0.2), rung("qat", 0.002), rung("qat", 0.003)
FLOAT_COST = Cost(bytes=91_200_000, seconds=0.0142, peak_bytes=212_000_000, batch="8 x 64 tokens")
FASTER = Cost(bytes=17_900_000, seconds=0.0071, peak_bytes=131_000_000, batch="8 x 64 tokens")
SHRUNK = Symptom(
    module="model.layers.3.up.weight",
    what="few codes",
    figure="3 of its codes are used, and 16 were at the start",
    remedy="its scale grew: lower train.scale_learning_rate",
    first=50,
    last=80,
)
PASSED = Report(
    title="A small model",
    scheme="w4a8",
    target="onnx",
    outcome="passed",
    rung="qat",
    baseline={"perplexity": 7.4},
    rungs=[RTN, QAT],
    artefact=EXPORTED,
    float_cost=FLOAT_COST,
    artefact_cost=FASTER,
    curve=[
        {"step": s, "loss": 2 - s / 100, "held_out": 2 - s / 120, "learning_rate": 1e-5}
        for s in range(0, 90, 10)
    ],
    symptoms=[SHRUNK],
    layer_errors={
        "rtn": {f"model.layers.{n}.up": 0.05 + n / 500 for n in range(36)},
        "qat": {f"model.layers.{n}.up": 0.02 + n / 900 for n in range(36)},
    },
    notes=["lm_head is kept in float."],
    facts={"seed": "0"},
)
EMPTY = Report(
    title="A small model",
    scheme="w4a8",
    target="onnx",
    outcome="failed",
    rung=None,
    baseline={},
    rungs=[],
    artefact=None,
    float_cost=None,
    artefact_cost=None,
    curve=[],
    symptoms=[],
    layer_errors={},
    notes=[],
    facts={},
)
FAILED = dataclasses.replace(
    EMPTY, rungs=[RTN], baseline=PASSED.baseline, layer_errors={"rtn": PASSED.layer_errors["rtn"]}
)


@functools.cache
def passed_page():
    """`html(PASSED)`, drawn once for all tests that only read it."""
    return html(PASSED)


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps the attributes, the ids and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def has(self, sentence):
        return sentence in " ".join(" ".join(self.text).split())


@pytest.mark.parametrize("report", [PASSED, FAILED, EMPTY], ids=["passed", "failed", "empty"])
def test_the_page_needs_nothing_else(report):
    text = html(report)
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "image"} & set(page.tags)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(
        value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href")
    )
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert page.tags.count("section") == 7


def test_ids_are_unique_and_every_reference_has_one():
    text = passed_page()
    ids = [value for name, value in Page(text).attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert references
    assert references <= set(ids)


def test_colours_follow_the_page():
    text = passed_page()
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert {"--series-1", "--series-2", "--ink", "--muted", "--line"} <= used
    light, dark = (
        set(re.findall(r"(--[a-z0-9-]+):", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)
    )
    assert light == dark >= used
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", text)
    body = text[text.index("</style>") :]
    assert re.findall(r"(?:fill|stroke): ?#", body) == []


def test_hostile_names_are_text():
    hostile = dataclasses.replace(
        PASSED,
        title=HOSTILE,
        scheme=HOSTILE,
        target=HOSTILE,
        rung=HOSTILE,
        rungs=[dataclasses.replace(RTN, name=HOSTILE), rung_of(HOSTILE)],
        layer_errors={HOSTILE: {HOSTILE: 0.1, "b.c": 0.2}},
        symptoms=[Symptom(module=HOSTILE, what=HOSTILE, figure=HOSTILE, remedy=HOSTILE)],
        notes=[HOSTILE],
        facts={HOSTILE: HOSTILE},
        artefact_cost=dataclasses.replace(FASTER, batch=HOSTILE),
        retuned=Retuned(
            budget=1.0,
            seconds=0.0,
            tries=[Try(kind="bits", name=HOSTILE, why=HOSTILE, learning_rate=1.0, steps=1, error=HOSTILE)],
            raised={HOSTILE: (HOSTILE, HOSTILE)},
            advice=[HOSTILE],
        ),
    )
    page = Page(html(hostile))
    assert "script" not in page.tags
    assert sum(HOSTILE in text for text in page.text) >= 8
    text = markdown(hostile)
    assert "<script" not in text
    for line in text.splitlines():
        if line.startswith("| &lt;"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 6, 8, 10)


def test_what_training_showed_is_a_table():
    page, text = Page(passed_page()), markdown(PASSED)
    assert page.has("What training showed")
    for said in (SHRUNK.module, SHRUNK.what, SHRUNK.figure, SHRUNK.remedy, "50 to 80"):
        assert page.has(said)
    row = f"| {SHRUNK.module} | few codes | {SHRUNK.figure} | 50 to 80 | {SHRUNK.remedy} |"
    assert row in text.splitlines()
    many = dataclasses.replace(PASSED, symptoms=[SHRUNK] * 23)
    for said in (" ".join(Page(html(many)).text), markdown(many)):
        assert said.count(SHRUNK.figure) == 20
        assert "And 3 more." in said


SEARCHED = Try(
    kind="search", name="rate 0.01, 3 steps", why="search", learning_rate=0.01, steps=3, error="step 2: nan"
)
RETUNED = Retuned(
    budget=1800.0,
    seconds=90.0,
    tries=[
        dataclasses.replace(SEARCHED, kind="recipe", name="qat", held_out=0.5, outcome="failed", error=""),
        SEARCHED,
        dataclasses.replace(SEARCHED, kind="rate", name="qat 2", seconds=61.0, outcome="passed", error=""),
    ],
    raised={"model.layers.3.up": ("w2a16", "w4a16")},
    advice=["more steps: the held-out loss of qat 2 still fell at its last step"],
)


def test_what_was_tried_is_a_table_with_what_was_raised_and_what_is_worth_more_time():
    tuned = dataclasses.replace(PASSED, rung="qat 2", retuned=RETUNED)
    page, text = Page(html(tuned)), markdown(tuned)
    for said in ("Re-tuning", "rate 0.01, 3 steps", "step 2: nan", "model.layers.3.up", RETUNED.advice[0]):
        assert page.has(said)
    lines = text.splitlines()
    assert "90 s of 30 min were spent." in lines
    assert "| qat | search | 0.01 | 3 | 0.5 | 0 ms | failed |" in lines
    assert "| rate 0.01, 3 steps | search | 0.01 | 3 | inf | 0 ms | no gate asked: step 2: nan |" in lines
    assert "| model.layers.3.up | w2a16 | w4a16 |" in lines
    assert f"- {RETUNED.advice[0]}" in lines
    for said in (passed_page(), markdown(PASSED)):
        assert "Re-tuning" not in said


def test_a_training_without_symptoms_says_so():
    healthy = dataclasses.replace(PASSED, symptoms=[])
    for said in (html(healthy), markdown(healthy)):
        assert "It showed no symptom." in said
        assert "What training showed" not in said
    for said in (html(EMPTY), markdown(EMPTY)):
        assert "symptom" not in said.split("</style>")[-1]


def rung_of(name):
    gate = Gate(name, max_increase="2%")
    verdict = gate.check({name: [1.0] * 9}, {name: [1.0] * 9})
    return Rung(name=name, metrics={name: 1.0}, verdicts=[verdict], seconds=1.0, outcome="passed")


@pytest.mark.parametrize(
    "sentence",
    [
        "No rung was tried, so there is nothing to compare.",
        "No pair of files was measured in one engine, so size and speed are not compared.",
        "No rung trained the model.",
        "The modules were not compared one by one.",
        "Nothing to note.",
        "None were recorded.",
    ],
)
def test_what_is_missing_is_said(sentence):
    assert Page(html(EMPTY)).has(sentence)
    assert not Page(passed_page()).has(sentence)
    assert sentence not in markdown(PASSED)
    if "modules" not in sentence:
        assert sentence in markdown(EMPTY)
    assert "svg" not in Page(html(EMPTY)).tags


def test_every_gate_of_every_rung_has_its_verdict_and_its_picture():
    text = passed_page()
    assert text.count('<svg class="interval"') == 6
    assert Page(text).has("Exported file, read back and measured again")
    for measured in (RTN, QAT, EXPORTED):
        for verdict in measured.verdicts:
            assert Page(text).has(f"{verdict.amount(verdict.lo)} .. {verdict.amount(verdict.hi)}")
            assert f"{verdict.amount(verdict.lo)} .. {verdict.amount(verdict.hi)}" in markdown(PASSED)


def test_the_picture_passes_exactly_when_the_bar_is_left_of_the_limit():
    bars = re.findall(
        r'class="limit" d="M([\d.]+).*?class="bar (\w+)" d="M([\d.]+) 11 H([\d.]+)', passed_page()
    )
    assert [bar[1] for bar in bars] == ["failed"] * 2 + ["passed"] * 4
    for limit, outcome, best, worst in bars:
        assert float(limit) == 120.0
        assert float(best) < float(worst) or float(best) == 192.0
        assert (float(worst) <= 120.0) == (outcome == "passed")


def test_a_verdict_without_an_interval_has_no_picture():
    verdict = Gate("accuracy", max_decrease="2%").check({"accuracy": 0.9}, {"accuracy": math.nan})
    broken = Rung(
        name="rtn", metrics={"accuracy": math.nan}, verdicts=[verdict], seconds=1.0, outcome="failed"
    )
    text = html(dataclasses.replace(EMPTY, rungs=[broken]))
    assert "<svg" not in text
    assert Page(text).has("the candidate's accuracy is nan")


@pytest.mark.parametrize(
    ("seconds", "sentence"),
    [
        (0.0187, "The exported file is SLOWER than the float file: 1.32 times the time for each batch."),
        (0.0142, "The exported file is as fast as the float file, no faster."),
        (0.0071, "The exported file is 2.00 times as fast as the float file."),
    ],
)
def test_speed_is_said_plainly(seconds, sentence):
    report = dataclasses.replace(PASSED, artefact_cost=dataclasses.replace(FASTER, seconds=seconds))
    assert Page(html(report)).has(sentence)
    assert sentence in markdown(report)


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (PASSED, "qat keeps every gate within its limit, and so does the exported file."),
        (dataclasses.replace(PASSED, artefact=None), "qat keeps every gate within its limit."),
        (FAILED, "No rung keeps every gate within its limit (tried: rtn): do not quantize it this way."),
        (
            dataclasses.replace(PASSED, outcome="failed", artefact=RTN),
            "qat passed, but the exported file does not: do not ship it.",
        ),
        (
            dataclasses.replace(FAILED, outcome="undecided", rungs=[rung("gptq", 0.0197)]),
            "It is not certain that gptq keeps its limits (perplexity: increase of at most 2%): ",
        ),
    ],
)
def test_the_headline_is_the_outcome(report, sentence):
    page = Page(html(report))
    assert page.has(sentence)
    assert sentence in markdown(report)
    assert f"**{report.outcome.upper()}.**" in markdown(report)
    assert ("class", f"outcome {report.outcome}") in page.attributes


def test_every_module_is_named_in_model_order():
    errors = {"rtn": {f"model.layers.{n}.up": 0.01 * (n + 1) for n in range(250)}}
    text = html(dataclasses.replace(PASSED, layer_errors=errors))
    names = [data for data in Page(text).text if re.fullmatch(r"\d+\.up", data.strip())]
    assert [name.strip() for name in names] == [f"{n}.up" for n in range(250)]
    assert Page(text).has("modules below model.layers")
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)" role="img" aria-label="Relative', text)[0])
    assert height / 250 > 11  # points for each row, of 7.5 point text


def test_errors_that_have_no_place_on_a_log_axis_do_not_stop_the_page():
    errors = {"rtn": {"a": 0.0, "b": math.nan, "c": math.inf, "d": 0.1}}
    page = Page(html(dataclasses.replace(PASSED, layer_errors=errors)))
    assert {"a", "b", "c", "d"} <= {text.strip() for text in page.text}


def test_a_single_step_makes_no_curve():
    report = dataclasses.replace(PASSED, curve=PASSED.curve[:1])
    assert Page(html(report)).has("Training logged a single step, which makes no curve.")


def test_the_same_report_gives_the_same_bytes():
    assert html(PASSED) == passed_page()


def test_write_replaces_both_files_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "run" / "report"
    write(EMPTY, folder)
    write(PASSED, folder)
    assert sorted(os.listdir(folder)) == ["report.html", "report.md"]
    assert (folder / "report.html").read_text(encoding="utf-8") == passed_page()
    assert (folder / "report.md").read_text(encoding="utf-8") == markdown(PASSED)


def test_a_write_that_breaks_off_keeps_the_old_file(tmp_path, monkeypatch):
    write(PASSED, tmp_path)

    def full(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write(EMPTY, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.md"]
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == markdown(PASSED)


def test_a_report_is_json():
    assert json.loads(json.dumps(dataclasses.asdict(PASSED)))["rungs"][0]["name"] == "rtn"


def test_importing_the_room_loads_no_plotting():
    code = "import sys, recoup.validate; print('matplotlib' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "False"


def test_the_first_look_has_no_loss_yet():
    """Training records step 0 before it has trained: a held-out loss alone."""
    report = dataclasses.replace(PASSED, curve=[{"step": 0, "held_out": 2.0}, *PASSED.curve])
    assert f"{PASSED.curve[0]['loss']:.4g}" in markdown(report)
    assert Page(html(report)).has("Training")


WHY = "the folder ran in an engine without kernels; serve it elsewhere to measure them"
UNMEASURED = dataclasses.replace(
    PASSED,
    **{
        f"{which}_cost": Cost(bytes=size, seconds=None, peak_bytes=None, batch="8 x 64", unmeasured=WHY)
        for which, size in (("float", 91_200_000), ("artefact", 17_900_000))
    },
)


def test_what_was_not_measured_has_a_reason_and_no_figure():
    page, text = Page(html(UNMEASURED)), markdown(UNMEASURED)
    sentence = f"Speed and memory were not measured: {WHY}."
    assert sentence in text
    assert page.has(sentence)
    for figure in ("latency", "peak memory", "as fast"):
        assert figure not in text
        assert not page.has(figure)
    assert "| size on disk | 91.2 MB | 17.9 MB | 0.20 |" in text
    assert page.has("17.9 MB")
    assert page.has("size, MB")  # the picture of quality against size stays


def test_a_cost_is_one_line():
    assert str(FASTER) == "17.9 MB, 7.1 ms for 8 x 64 tokens, peak 131 MB"
    assert str(UNMEASURED.artefact_cost) == f"17.9 MB; speed and memory not measured: {WHY}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0031, "3.1 ms"), (0.9997, "1 s"), (119, "119 s"), (121, "2.02 min"), (72000, "20 h")],
)
def test_a_duration_is_written_in_the_unit_that_it_rounds_to(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (999_700, "1 MB"), (93.1e6, "93.1 MB")]
)
def test_a_size_is_written_in_the_unit_that_it_rounds_to(count: float, text: str) -> None:
    assert size(count) == text
