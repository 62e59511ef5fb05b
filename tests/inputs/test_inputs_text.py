"""Text of other people: encodings, pointers, prompts of one line."""

import pytest

from d2g_jax.inputs.text import as_prompt, lines, natural_key, read_json, read_text
from d2g_jax.runtime.errors import UserError


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_text(mark, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(f'{mark}{{"a": "“é”"}}', encoding="utf-8")
    assert read_json(file, "") == {"a": "“é”"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", "a.json: not UTF-8 at byte 3; save it as UTF-8"),
        ("{}".encode("utf-16"), "a.json: not UTF-8 at byte 0; save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer.*git lfs pull"),
        (None, "a.json is missing; give it"),
        (b"[1]", "a.json: expected a JSON object, not a list; give it"),
        (b"{", "a.json cannot be read .*; give it"),
        (b"[" * 100_000, "a.json cannot be read .*recursion"),
    ],
)
def test_what_is_no_json_object(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(tmp_path / "a.json", "give it")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        read_text(tmp_path, "")


def test_lines_end_as_in_editors():
    assert lines("a\r\nb\rc\u2028d\x85e\n") == ["a", "b", "c\u2028d\x85e"]
    assert (lines(""), lines("a"), lines("a\n\n")) == ([], ["a"], ["a", ""])


@pytest.mark.parametrize("value", ["bold\n7", "bold\r\n7", "bold\r7"])
def test_a_prompt_is_one_line(value):
    assert as_prompt(value, "prompt") == "bold 7"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a \ud83d", "--prompt holds half a character .*after 2 characters"),
        ("caf\udce9", "--prompt holds half a character"),
        (7, "--prompt holds int, no text"),
        (None, "--prompt holds NoneType, no text"),
    ],
)
def test_what_is_no_prompt(value, message):
    with pytest.raises(UserError, match=message) as caught:
        as_prompt(value, "--prompt")
    str(caught.value).encode()  # it can be printed


def test_numbers_in_names_sort_as_numbers():
    assert sorted(["b2", "b10", "a"], key=natural_key) == ["a", "b2", "b10"]
