"""The report page: what it shows, what it survives, that it needs nothing but itself, and how a browser lays it out."""

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from d2g_jax.report import page, write_report
from d2g_jax.report.charts import LEFT, RIGHT, WIDTH, Axis, Series, format_number, line_chart
from d2g_jax.report.curves import image_rates
from d2g_jax.report.inputs import read_inputs, read_metrics
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.grid import save_png

HOSTILE = """a <script>alert("1")</script> 'three' & </style><img src=x onerror=alert(2)>"""
STATUS = {"state": "running", "stage": "training", "unit": "images", "written": "2026-11-22T10:00:00+00:00"}
VOID = {"meta", "link", "img", "input", "br"}


class Outline(HTMLParser):
    """Checks that every tag is closed in order, and keeps tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def write(path, data):
    path.write_text(json.dumps(data), "utf-8")


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text("utf-8")


def sections_of(text):
    return re.findall(r'<section id="(\w+)">', text)


def test_the_page_shows_what_the_run_holds(workdir):
    text = page_of(workdir)
    outline = Outline(text)
    words = " ".join(outline.text)
    assert sections_of(text) == ["samples", "measured", "curves", "time", "speed", "settings"]
    for expected in (
        "digits-demo",
        "finished",
        "2 cores",
        "0.10.2",
        "a bold seven",
        "teacher, 50 steps",
        "14.12",
        "0.087",
        "Digit right",
        "All right",
    ):
        assert expected in words
    for expected in (
        "e_latent_lpips",
        "1e-05",
        "1 min 55 s",
        "regression",
        "mse outside, healthy 0.8 to 1.25",
        "1 not finite",
    ):
        assert expected in words
    assert len([one for one in outline.attributes("svg") if one["class"] == "chart"]) == 3  # two metrics and speed
    assert len(outline.attributes("img")) == 3 + 3
    assert [path.name for path in workdir.glob("*report*")] == ["report.html"]
    assert list(workdir.glob(".report*")) == []


def test_a_column_with_fewer_images_than_prompts_has_gaps(workdir):
    file = workdir / "samples" / "comparison.json"
    data = json.loads(file.read_text())
    data["columns"][1]["images"] = []
    write(file, data)
    assert len(Outline(page_of(workdir)).attributes("img")) == 3 + 3 - 1


def test_walks_and_nearest_pairs_say_how_they_were_made(gallery):
    text = page_of(gallery)
    assert sections_of(text)[4:7] == ["walks", "beside", "nearest"]
    outline = Outline(text)
    words = " ".join(outline.text)
    for expected in (
        "one network call for each picture",
        "“a bold seven” → “a thin one”",
        "noise on an arc",
        "nearest of 4,096 of the 10,000 pairs",
        "0.432 from its nearest other pair",
        "pair 41",
        "Of 64 pairs that were kept out of training",
        "by LatentLPIPS",
        "0.125",
    ):
        assert expected in words
    assert len(outline.attributes("img")) == 3 + 3 + 8 + 8 + 4 + 3
    data = json.loads((gallery / "samples" / "gallery.json").read_text())
    data["walks"][0]["images"][0] = "../../outside.png"
    save_png(gallery.parent / "outside.png", np.zeros((4, 4, 3), np.uint8))
    write(gallery / "samples" / "gallery.json", data)
    assert len(Outline(page_of(gallery)).attributes("img")) == 3 + 3 + 8 + 8 + 4 + 3 - 1


def test_a_job_of_several_runs_shows_their_pictures(workdir):
    image = np.zeros((8, 8, 3), np.uint8)
    for run in ("mse", "full"):
        save_png(workdir / "students" / run / "samples" / "images_00000064.png", image)
        save_png(workdir / "students" / run / "samples" / "walk" / "0.png", image)
        walk = {"of": "noise", "prompts": [f"walk of {run}"], "images": ["samples/walk/0.png"]}
        nearest = {"searched": 1, "pairs": 1, "between_pairs": 0.0, "rows": []}
        data = {"images": 64, "walks": [walk], "nearest": nearest}
        write(workdir / "students" / run / "samples" / "gallery.json", data)
    inputs = read_inputs(workdir)
    assert [(run, [seen for seen, _ in steps]) for run, steps in inputs.timelines.items()] == [
        ("", [0, 5, 10]),
        ("mse", [64]),
        ("full", [64]),
    ]
    assert list(inputs.galleries) == ["mse", "full"]
    words = " ".join(Outline(page_of(workdir)).text)
    assert "walk of mse" in words
    assert "walk of full" in words


def test_results_of_evaluate_share_a_column_only_if_measured_alike(workdir):
    def result(system, fid, protocol):
        return {
            "format": 1,
            "system": system,
            "complete": system == "a",
            "samples": 2000,
            "protocol": {"name": protocol, "sha256": "5" * 64, "features": "digits"},
            "prompts": {"sha256": "7" * 64},
            "images": {"sha256": "6" * 64, "formats": {"PNG": 2000}},
            "drawing": None,
            "weights": {"digits": {"sha256": "8" * 64}},
            "reference": {"images_sha256": "9" * 64},
            "metrics": {"fid": fid, "accuracy": {"all": 0.5}},
        }

    (workdir / "evaluation").mkdir()
    for system, fid, protocol in (("a", 17.5, "digits"), ("b", 18.25, "digits"), ("c", 3.0, "other")):
        write(workdir / "evaluation" / f"{system}.json", result(system, fid, protocol))
    text = page_of(workdir)
    section = re.search(r'<section id="evaluated">.*?</section>', text, re.S)[0]
    rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", section)[1:]]
    assert rows == [["17.5", "–", "0.5", "–"], ["18.2", "–", "0.5", "–"], ["–", "3", "–", "0.5"]]
    assert "b (incomplete)" in section
    assert "protocol other 555555555555, samples 2000, format PNG" in section
    write(workdir / "evaluation" / "a.json", {"metrics": {}})
    with pytest.raises(UserError, match=r"a\.json: no result of `d2g evaluate`"):
        write_report(workdir)


def test_curves_stand_by_kind_with_the_band_from_where_it_holds(tmp_path):
    lines = [
        {"images": 10 * k, "loss_regression": 1.0, "discriminator_wins": 0.2, "gradient_ratio": 0.5}
        for k in (1, 2, 3, 4)
    ]
    lines[2]["loss_adversarial"] = lines[3]["loss_adversarial"] = 0.7
    lines[3]["discriminator_wins"] = 0.5
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = page_of(tmp_path)
    assert re.findall(r'<h3 class="sub">(\w+)', text) == ["Health", "Losses"]
    assert re.findall(r"<figcaption><h3>(\w+)", text) == [
        "discriminator_wins", "gradient_ratio", "loss_regression", "loss_adversarial",
    ]  # fmt: skip
    bands = [float(x) for x in re.findall(r'class="band" x="([\d.]+)"', text)]
    assert bands == [pytest.approx(LEFT + 30 / 40 * (WIDTH - LEFT - RIGHT), abs=0.1), LEFT]
    assert "healthy 0.4 to 0.97" in text
    assert "healthy below 1" in text


def test_alarms_are_listed_with_their_span_and_cause(tmp_path):
    alarms = [[], ["r1_share high"], ["r1_share high", "logit_gap_text low"], ["logit_gap_text low"]]
    lines = [
        {"run": "full", "images": 8 * k, "r1_share": 0.1 * k, "logit_gap_text": -0.25, "alarms": on, "left_out": []}
        for k, on in enumerate(alarms, start=1)
    ]
    lines[2]["left_out"] = ["the R1 update of step 3 (images 16 to 24): loss_r1 is not finite"]
    lines += [{"run": "full", "images": 40, "loss": None, "alarms": [], "problem": "the generator's update of step 5"}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    page = Outline(write_report(tmp_path).read_text())
    text = " ".join(page.text)
    assert "r1_share high 0.2 16 until 32 R1 outweighs D's own loss" in text
    assert "logit_gap_text low −0.25 24 until 40 D takes wrong texts" in text
    assert "stopped: the generator's update of step 5" in text
    assert "the R1 update of step 3 (images 16 to 24): loss_r1 is not finite" in text


def test_missed_bars_and_missing_values_are_plain(workdir):
    text = page_of(workdir)
    verdicts = re.findall(r'<td class="verdict (\w+)">([^<]+)</td>', text)
    assert verdicts == [("met", "✓ met"), ("missed", "✗ missed"), ("absent", "not measured")]
    row = re.search(r"real test images</th>(.*?)</tr>", text)[1]
    assert re.findall(r">([^<]+)</td>", row) == ["–", "0.31", "0.900", "0.950", "0.990", "0.850", "–", "–"]


def test_nothing_is_loaded_from_anywhere(workdir):
    text = page_of(workdir).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z0-9]|@import|url\(", text.replace("// The nearest", ""))
    for tag, attributes in Outline(text).tags:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)


def test_text_from_files_is_text(workdir):
    config = json.loads((workdir / "config.json").read_text())
    write(workdir / "config.json", {**config, HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}})
    lines = [{"run": HOSTILE, "images": 1, HOSTILE: 1.0}, {"run": HOSTILE, "images": 2, HOSTILE: 2.0}]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = {"systems": {HOSTILE: {HOSTILE: HOSTILE}}, "checks": [{"name": HOSTILE, "value": HOSTILE, "bar": HOSTILE}]}
    write(
        workdir / "result.json", {**result, "protocol": {HOSTILE: HOSTILE}, "seconds": {HOSTILE: 1.0}, HOSTILE: HOSTILE}
    )
    text = page_of(workdir)
    outline = Outline(text)
    assert text.count("<script") == text.count("</script>") == 1
    assert all("onerror" not in attributes for _, attributes in outline.tags)
    assert html.escape(HOSTILE) in text
    assert HOSTILE in " ".join(outline.text)


def test_a_killed_run_leaves_half_a_line(workdir):
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"run": "full", "images": 38')
    words = " ".join(Outline(page_of(workdir)).text)
    assert "1 line is not whole and left out; the last line is one of them" in words


def test_broken_lines_are_counted_wherever_they_are(tmp_path):
    lines = ['{"images": 1, "a": 1}', "[1]", "\x00\x00", "", '{"images": "2"}', '{"images": 3, "a": null, "b": true}']
    huge = "9" * 400
    lines += [f'{{"images": {huge}}}', "[" * 100_000, f'{{"images": 4, "a": {huge}}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert (metrics.broken, metrics.broken_tail) == (5, False)
    assert [row.images for row in metrics.runs[""]] == [1, 3, 4]
    assert math.isinf(metrics.runs[""][2].metrics["a"])
    assert "2 not finite" in page_of(tmp_path)
    assert list(metrics.runs[""][1].metrics) == ["a"]
    assert math.isnan(metrics.runs[""][1].metrics["a"])


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    seen = [(10, 1.0), (20, 2.0), (30, 3.0), (20, 0.5), (30, 1.5)]  # killed at 30, resumed from 10, its clock from 0
    lines = [json.dumps({"images": images, "seconds": seconds, "loss": 1.0}) for images, seconds in seen]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.replaced == 2
    assert [(row.images, row.seconds) for row in metrics.runs[""]] == [(10, 1.0), (20, 0.5), (30, 1.5)]
    assert image_rates(metrics.runs[""]) == ([30], [10.0])


def test_a_plain_train_workdir_has_one_run_and_its_state(tmp_path):
    write(tmp_path / "config.json", {"train": {"images": 200}})
    (tmp_path / "metrics.jsonl").write_text('{"images": 50, "step": 1, "seconds": 1, "loss": 2}\n')
    assert 'class="state running"' in page_of(tmp_path)  # of a job without status.json
    write(tmp_path / "status.json", STATUS | {"done": 50, "total": 200})
    text = page_of(tmp_path)
    assert "running, 25%" in text
    assert sections_of(text) == ["curves", "settings"]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"images": 200, "step": 4, "seconds": 4, "loss": 1}\n')
    write(tmp_path / "status.json", STATUS | {"state": "finished"})
    assert 'class="state finished"' in page_of(tmp_path)
    assert sections_of(page_of(tmp_path)) == ["curves", "speed", "settings"]


def test_a_folder_with_one_file_has_one_section(tmp_path):
    write(tmp_path / "result.json", {"systems": {"teacher": {"frechet_to_real": 1.0}}})
    text = page_of(tmp_path)
    Outline(text)
    assert sections_of(text) == ["measured"]


def test_evaluations_alone_are_a_page(tmp_path):
    (tmp_path / "evaluation").mkdir()
    result = {
        "format": 1,
        "system": "a",
        "complete": True,
        "samples": 2000,
        "protocol": {"name": "digits", "sha256": "5" * 64, "features": "digits"},
        "prompts": None,
        "images": {"sha256": "6" * 64, "formats": {"PNG": 2000}},
        "drawing": None,
        "weights": {"digits": {"sha256": "8" * 64}},
        "metrics": {"accuracy": {"all": 0.5}},
    }
    write(tmp_path / "evaluation" / "a.json", result)
    text = page_of(tmp_path)
    assert sections_of(text) == ["evaluated"]
    assert 'class="state finished"' in text


def test_images_outside_of_the_workdir_are_not_shown(workdir):
    save_png(workdir.parent / "other.png", np.zeros((4, 4, 3), np.uint8))
    data = {"prompts": ["a"], "columns": [{"name": "x", "images": ["../other.png"]}]}
    write(workdir / "samples" / "comparison.json", data)
    assert read_inputs(workdir).comparison["columns"] == [{"name": "x", "images": [None]}]
    for name in ("\0", "\ud800", "a" * 5000):  # no file can have these names
        data["columns"][0]["images"] = [name]
        write(workdir / "samples" / "comparison.json", data | {"prompts": [name]})
        assert "absent" in page_of(workdir)


def test_large_images_are_made_smaller(workdir):
    noise = np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), np.uint8)
    save_png(workdir / "samples" / "images_00000010.png", noise)
    text = page_of(workdir)
    assert "data:image/webp;base64," in text
    assert len(text) < (workdir / "samples" / "images_00000010.png").stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json cannot be read"),
        ("result.json", "[]", r"result\.json: expected a JSON object, not a list"),
        ("result.json", '{"systems": []}', r"result\.json: key 'systems'"),
        (
            "samples/comparison.json",
            '{"prompts": ["a"], "columns": [{"name": "x"}]}',
            r"comparison\.json: .*KeyError: 'images'",
        ),
        ("samples/comparison.json", '{"prompts": 1, "columns": []}', r"comparison\.json: .*a int in place of a list"),
        ("samples/gallery.json", '{"images": 1}', r"gallery\.json: not of its form \(KeyError"),
        ("status.json", '{"state": "asleep"}', r"status\.json: not a status"),
        ("status.json", json.dumps(STATUS | {"stage": 3}), r"status\.json: not a status \(stage 3 is no text\)"),
        ("status.json", json.dumps(STATUS | {"unit": None}), r"status\.json: not a status \(unit None is no text\)"),
        ("status.json", "[]", r"status\.json: expected a JSON object, not a list"),
        ("config.json", "[" * 100_000, r"config\.json cannot be read"),
        ("result.json", '{"checks": [{"value": ' + "9" * 400 + "}]}", r"report\.html: .* a number too large"),
        (
            "metrics.jsonl",
            '{"images": 8, "loss": 1e308}\n{"images": 16, "loss": -1e308}',
            r"report\.html: .* too large",
        ),
        ("samples/images_00000005.png", "no image", r"images_00000005\.png: not a readable image"),
    ],
)
def test_a_broken_file_is_named_in_one_line(workdir, name, content, message):
    (workdir / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        write_report(workdir)
    assert "\n" not in str(caught.value)
    assert not (workdir / "report.html").exists()


def test_what_is_nested_too_deep_for_a_page_is_one_line(workdir, monkeypatch):
    """So far the reader of JSON stops before."""
    (workdir / "report.html").write_text("before")
    monkeypatch.setattr(page.overview, "settings", lambda inputs: page.overview.settings(inputs))
    with pytest.raises(UserError, match=r"report\.html: .* nested too deep"):
        write_report(workdir)
    assert (workdir / "report.html").read_text() == "before"


def test_a_missing_or_empty_workdir_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such workdir"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match="nothing to report on"):
        write_report(tmp_path)


def test_the_axis_is_logarithmic_beyond_two_decades_only():
    def remarks(values):
        return line_chart("loss", [Series("a", 0, range(len(values)), values)])

    assert "<span>log</span>" in remarks([1.0, 0.009])
    assert "<span>log</span>" not in remarks([1.0, 0.011])
    assert "<span>log</span>" not in remarks([1.0, 0.0])
    assert remarks([math.nan]) == ""


def test_a_line_breaks_where_a_value_is_not_finite_and_long_ones_are_thinned():
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 5.0, 6.0]
    chart = line_chart("loss", [Series("a", 0, range(7), values)])
    assert re.findall(r'data-values="([^"]*)"', chart) == ["1 2", "3", "5 6"]
    long = line_chart("loss", [Series("a", 0, range(10_000), [float(k % 7) for k in range(10_000)])])
    assert 100 < len(re.search(r'data-values="([^"]*)"', long)[1].split()) <= 160
    assert 'class="extent"' in long


def test_axis_and_numbers():
    axis = Axis(0.1, 10.0, 0.0, 100.0, log=True)
    assert axis(1.0) == pytest.approx(50.0)
    assert axis.ticks() == pytest.approx([0.1, 1.0, 10.0])
    assert Axis(0.0, 10.0, 0.0, 1.0).ticks() == [0, 2, 4, 6, 8, 10]
    numbers = {None: "–", 0: "0", 24576: "24,576", 0.97312: "0.973", -2.5: "−2.5", 0.00012: "1.20e−04", "≥ 1": "≥ 1"}
    assert {value: format_number(value) for value in numbers} == numbers
    assert format_number(math.nan) == "NaN"
