"""The report page: what it shows, what it survives, that it needs nothing but itself, and how a browser lays it out."""

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from d2g_jax.errors import UserError
from d2g_jax.grid import grid, save_png
from d2g_jax.report import write_report
from d2g_jax.report.charts import Axis, Series, format_number, line_chart
from d2g_jax.report.curves import image_rates
from d2g_jax.report.inputs import read_inputs, read_metrics

HOSTILE = """a <script>alert("1")</script> 'three' & </style><img src=x onerror=alert(2)>"""
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


@pytest.fixture
def workdir(tmp_path):
    """A finished demo with everything that a page can show."""
    folder = tmp_path / "digits-demo"
    folder.mkdir()
    environment = {"device": "2 cores", "versions": {"jax": "0.10.2"}}
    loss = {"regression": "e_latent_lpips", "l1_weight": 1.0}
    train = {"images": 320, "learning_rate": 1e-5, "mix_and_match": True, "loss": loss}
    write(folder / "config.json", {"seed": 7, "train": train, "environment": environment})
    lines = [
        {
            "run": run,
            "images": 32 * k,
            "step": k,
            "seconds": 0.5 * k,
            "regression": 10.0 ** (-k / 3),
            "latent_std_ratio": level,
        }
        for run, level in (("mse", 0.5), ("full", 1.0))
        for k in range(1, 11)
    ]
    lines += [
        {"run": "full", "images": 352, "step": 11, "seconds": 6.0, "regression": math.nan, "latent_std_ratio": 1.0}
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    scores = {"digit": 0.9, "weight": 0.95, "slant": 0.99, "all": 0.85}
    result = {
        "protocol": {"name": "digits", "samples": 2000},
        "systems": {
            "real test images": {"frechet_to_teacher": None, "frechet_to_real": 0.31, "accuracy": scores},
            "MSE-only student": {"frechet_to_teacher": 14.125, "frechet_to_real": 15.0, "network_calls": 1},
            "full student": {"frechet_to_teacher": 2.5, "seconds_per_image": 0.0012, "accuracy": scores},
        },
        "floors": {"teacher_vs_teacher": 0.087},
        "checks": [
            {"name": "near the teacher", "value": 0.951, "bar": "≥ 0.95", "met": True},
            {"name": "full no worse", "value": 2.91, "bar": "≤ 2.71", "met": False},
            {"name": "memory", "value": None, "bar": 4, "met": None},
        ],
        "seconds": {"pairs": 115.2, "train_full": 84.0},
        "environment": environment,
    }
    write(folder / "result.json", result)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    for name in ("teacher", "full"):
        save_png(folder / "samples" / name / "00000.png", image)
    for step in (0, 5, 10):
        save_png(folder / "samples" / f"images_{step:08d}.png", grid(image[None].repeat(8, 0), 4))
    columns = [
        {"name": "teacher, 50 steps", "images": ["samples/teacher/00000.png", "samples/teacher/00000.png"]},
        {"name": "student, 1 step", "images": ["samples/full/00000.png", "samples/full/missing.png"]},
    ]
    write(folder / "samples" / "comparison.json", {"prompts": ["a bold seven", HOSTILE], "columns": columns})
    return folder


def write(path, data):
    path.write_text(json.dumps(data), "utf-8")


def page_of(folder, **options):
    path = write_report(folder, **options)
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
    ):
        assert expected in words
    for expected in ("e_latent_lpips", "1e-05", "1 min 55 s", "regression", "mse outside 0.8 to 1.25", "1 not finite"):
        assert expected in words
    assert len([one for one in outline.attributes("svg") if one["class"] == "chart"]) == 3  # two metrics and speed
    assert len(outline.attributes("img")) == 3 + 3
    assert [path.name for path in workdir.glob("*report*")] == ["report.html"]
    assert list(workdir.glob(".report*")) == []


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
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert (metrics.broken, metrics.broken_tail) == (3, False)
    assert [row.images for row in metrics.runs[""]] == [1, 3]
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
    text = page_of(tmp_path)
    assert "running, 25%" in text
    assert sections_of(text) == ["curves", "settings"]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"images": 200, "step": 4, "seconds": 4, "loss": 1}\n')
    assert 'class="state finished"' in page_of(tmp_path)
    assert 'class="state running"' in page_of(tmp_path, finished=False)
    assert sections_of(page_of(tmp_path)) == ["curves", "speed", "settings"]


def test_a_folder_with_one_file_has_one_section(tmp_path):
    write(tmp_path / "result.json", {"systems": {"teacher": {"frechet_to_real": 1.0}}})
    text = page_of(tmp_path)
    Outline(text)
    assert sections_of(text) == ["measured"]


def test_images_outside_of_the_workdir_are_not_shown(workdir):
    save_png(workdir.parent / "other.png", np.zeros((4, 4, 3), np.uint8))
    data = {"prompts": ["a"], "columns": [{"name": "x", "images": ["../other.png"]}]}
    write(workdir / "samples" / "comparison.json", data)
    assert read_inputs(workdir).comparison.images == [[None]]


def test_large_images_are_made_smaller(workdir):
    noise = np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), np.uint8)
    save_png(workdir / "samples" / "images_00000010.png", noise)
    text = page_of(workdir)
    assert "data:image/webp;base64," in text
    assert len(text) < (workdir / "samples" / "images_00000010.png").stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json: not valid JSON"),
        ("result.json", "[]", r"result\.json: holds a list"),
        ("result.json", '{"systems": []}', r"result\.json: key 'systems'"),
        ("samples/comparison.json", '{"prompts": ["a"], "columns": [{"name": "x", "images": []}]}', "every entry"),
        ("samples/comparison.json", '{"prompts": 1}', "must be lists"),
        ("samples/images_00000005.png", "no image", r"images_00000005\.png: not a readable image"),
    ],
)
def test_a_broken_file_is_named_in_one_line(workdir, name, content, message):
    (workdir / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        write_report(workdir)
    assert "\n" not in str(caught.value)
    assert not (workdir / "report.html").exists()


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
