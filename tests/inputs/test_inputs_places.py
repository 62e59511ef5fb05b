"""Places that others name: buckets, homes, empty variables, and outputs over other things."""

from pathlib import Path

import pytest

from d2g_jax.__main__ import main
from d2g_jax.inputs.places import cache_folder, check_new_folder, check_output, check_room, is_there, local_path
from d2g_jax.plan import store
from d2g_jax.runtime.errors import UserError


def test_a_home_is_found_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert local_path("~/out") == Path("/somewhere/out")
    assert local_path("a/~b") == Path("a/~b")


@pytest.mark.parametrize("text", ["~nobody-of-this-name", "~nobody-of-this-name/out", "~-/a.json"])
def test_a_home_of_nobody_is_no_folder(text):
    with pytest.raises(UserError, match=f"{text}: nobody knows this home; give the whole path, or ./~NAME"):
        local_path(text)
    assert local_path(f"./{text}") == Path(text)


def test_a_folder_with_the_name_of_a_home():
    assert local_path("./~/out") == Path("~/out")


@pytest.mark.parametrize("text", ["gs://bucket/x", "s3://bucket/x", "HTTPS://host/x", "file:///x"])
def test_addresses_are_no_folders(text):
    with pytest.raises(UserError, match=f"{text}: an address"):
        local_path(text)


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_variable_is_no_path(text):
    with pytest.raises(UserError, match="an empty path, as a variable that is not set leaves it"):
        local_path(text)


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--model=sd", "--prompt=a", "--out="],
        ["sample", "--model=sd", "--prompt=a", "--out=gs://bucket/x"],
        ["train", "--workdir=gs://bucket/x"],
        ["demo", "--workdir="],
        ["export", "--model=sd", "--to=flax", "--out=s3://bucket/x"],
        ["evaluate", "--protocol=digits", "--model=sd", "--out="],
        ["pairs", "--workdir="],
        ["train", "--workdir=x", "--pairs="],
        ["evaluate", "--protocol=digits", "--out=a.json", "--images=" + "a long prompt " * 30],
        ["metric", "--weights=metric", "--b=b", "--a=" + "a long prompt " * 30],
        ["sample", "--model=sd", "--prompt=a", "--out=~nobody-of-this-name/x"],
    ],
)
def test_every_job_says_so_before_any_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert command[-1].partition("=")[0] in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["a " * 500, "a/" + "b" * 300, "a\0b"])
def test_a_long_prompt_is_no_path(text):
    assert not is_there(text)
    with pytest.raises(UserError, match=r"(too long|null byte|null character).*; give another path") as refused:
        local_path(text)
    assert len(str(refused.value)) < 200
    assert ("a prompt itself goes to --prompt" in str(refused.value)) == (" " in text)


def test_links_in_a_circle_are_no_path(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="a/b: Too many levels of symbolic links; give another path"):
        local_path(tmp_path / "a" / "b")


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--out={tmp_path}: is a folder; give a file, {tmp_path}/a.json"):
        check_output(tmp_path, "a.json")
    with pytest.raises(UserError, match=f"{tmp_path}/file cannot be written"):
        check_output(tmp_path / "file" / "a.json", "a.json")
    with pytest.raises(UserError, match="is a file; give a folder"):
        check_new_folder(tmp_path / "file")
    with pytest.raises(UserError, match="holds other files"):
        check_new_folder(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/file cannot be written"):
        check_new_folder(tmp_path / "file" / "new" / "er")
    check_output(tmp_path / "new" / "a.json", "a.json")
    check_new_folder(tmp_path / "new" / "er")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("below", ["", "new", "new/er"])
def test_what_no_disk_holds_is_not_begun(below, tmp_path):
    check_room(tmp_path / below, 1000, "images")
    with pytest.raises(UserError, match=r"images take 1,000,000,000,000.0 MB, .* MB are free; ask for less"):
        check_room(tmp_path / below, 10**18, "images")


def test_without_a_home_nothing_is_cached(monkeypatch):
    def nobody(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "expanduser", nobody)
    assert cache_folder() is None
    for text in ("~", "~/out", "~/a/b.json"):
        with pytest.raises(UserError, match=f"{text}: nobody knows this home"):
            local_path(text)
    assert store.cached({"key": 1}, lambda: {"made": 1}) == {"made": 1}


def test_a_home_that_cannot_be_written_loses_no_plan(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the plan is not kept for the next time"):
        assert store.cached({"key": 1}, lambda: {"made": 1}) == {"made": 1}
