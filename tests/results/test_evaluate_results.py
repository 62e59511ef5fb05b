"""Result files that are not what they should be: one line that names file and key, never a traceback."""

import copy
import json

import pytest

from d2g_jax.__main__ import main
from d2g_jax.results.results import read_result
from d2g_jax.results.table import table
from d2g_jax.runtime.errors import UserError

RESULT = {
    "format": 1,
    "system": "a",
    "protocol": {"name": "digits", "sha256": "5" * 64, "features": "digits"},
    "samples": 2000,
    "complete": True,
    "images": {"sha256": "6" * 64, "formats": {"PNG": 2000}},
    "prompts": {"sha256": "7" * 64},
    "drawing": None,
    "weights": {"digits": {"sha256": "8" * 64}, "lpips": {"sha256": "1" * 64}, "clip_b32": {"sha256": "2" * 64}},
    "reference": {"images_sha256": "9" * 64},
    "teacher": {"sha256": "0" * 64},
    "metrics": {
        "fid": 12.0,
        "kid": {"mean": 1.0, "subset_size": 1000},
        "clip_b32": 0.25,
        "accuracy": {"all": 0.5},
        "lpips_diversity": {"mean": 0.5, "prompts": 100, "seeds": 4},
        "lpips_fidelity": 0.125,
    },
}
GONE = object()


def changed(path, value):
    """The result with one value replaced, or taken away."""
    result = copy.deepcopy(RESULT)
    *above, last = path.split("/")
    inner = result
    for key in above:
        inner = inner[key]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return result


def test_a_whole_one_is_read(tmp_path):
    drawings = ({"network_calls": 100, "seed": 0}, {"seed": 0})  # `d2g evaluate`'s and `d2g sample`'s
    for result in (RESULT, changed("prompts", None), *(changed("drawing", drawing) for drawing in drawings)):
        (tmp_path / "a.json").write_text(json.dumps(result))
        assert read_result(tmp_path / "a.json") == result
        assert "12.00" in table([result])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("protocol", "x", 'protocol is "x", not an object'),
        ("protocol/sha256", GONE, "protocol.sha256 is missing"),
        ("metrics/kid", 3, "metrics.kid is 3, not an object"),
        ("metrics/kid", {"mean": 1.0}, "metrics.kid.subset_size is missing"),
        ("metrics/fid", "12", 'metrics.fid is "12", not a finite number'),
        ("metrics/fid", None, "metrics.fid is null"),
        ("metrics/fid", True, "metrics.fid is true"),
        ("metrics/fid", float("nan"), "metrics.fid is NaN"),
        ("metrics/fid", 10**400, "metrics.fid is 1000"),
        ("metrics/accuracy", 0.5, "metrics.accuracy is 0.5, not an object"),
        ("metrics", [], "metrics is [], not an object"),
        ("prompts", GONE, "prompts is missing"),
        ("prompts", "x", 'prompts is "x", not an object'),
        ("drawing", [], "drawing is [], not an object"),
        ("weights", {}, "weights.digits is missing"),
        ("weights/lpips", None, "weights.lpips is null"),
        ("reference", None, "reference is null"),
        ("teacher", None, "teacher is null"),
        ("system", 3, "system is 3, not text"),
        ("complete", 1, "complete is 1, not true or false"),
        ("samples", 1.5, "samples is 1.5, not a whole number"),
        ("images/formats", ["PNG"], "images.formats is"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(path, value, message, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(changed(path, value)))
    assert main(["evaluate", "table", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"d2g: {file}: {message}")
    assert error.count("\n") == 1


def test_what_cannot_be_read(tmp_path):
    file = tmp_path / "a.json"
    for content in (b"\xff", b"[" * 100_000, b'{"format": ' + b"1" * 5000 + b"}"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^{file}.*(not UTF-8 at byte 0|cannot be read)"):
            read_result(file)


def test_images_of_unknown_prompts_have_columns_of_their_own():
    one, same, other = (changed("prompts", None) | {"system": name} for name in "abc")
    other["images"] = {**other["images"], "sha256": "f" * 64}
    lines = table([one, same, other, RESULT | {"system": "d"}]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:6]]
    columns = [i for i, title in enumerate(cells[0]) if "FID" in title]
    assert [[row[0] for row in cells[2:] if row[i] != "–"] for i in columns] == [["a", "b"], ["c"], ["d"]]
    assert "prompts unknown, of images 666666666666" in "\n".join(lines)


def test_accuracies_of_two_classifiers_have_columns_of_their_own():
    other = changed("weights/digits", {"sha256": "f" * 64}) | {"system": "b"}
    assert table([RESULT, other]).splitlines()[0].count("accuracy") == 2
