"""Prompts from text, JSON lines, parquet and TFDS folders, and every way in which they can be wrong."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from d2g_jax.pairs import read_prompts
from d2g_jax.records import framing
from d2g_jax.runtime.errors import UserError

PROMPTS = ("a cat", "“ein Hund”, größer", "a cat", "two\u2028lines")


def write_text(folder, lines=PROMPTS):
    file = folder / "prompts.txt"
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def write_jsonl(folder, lines=PROMPTS):
    file = folder / "prompts.jsonl"
    rows = [json.dumps({"url": i, "caption": line}, ensure_ascii=False) for i, line in enumerate(lines)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def write_parquet(folder, lines=PROMPTS, kind="string"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"dictionary": pa.dictionary(pa.int32(), pa.string())}
    column = pa.array(list(lines), pa.binary() if kind == "binary" else pa.string())
    column = column.cast(kinds.get(kind) or getattr(pa, kind)())
    file = folder / f"{kind}.parquet"
    pq.write_table(pa.table({"url": list(range(len(lines))), "caption": column}), file, row_group_size=2)
    return file


def write_tfds(folder, lines=PROMPTS, splits=("test", "train")):
    """A folder in the layout of TFDS, as its own classes describe it; two shards a split."""
    import tensorflow_datasets as tfds

    folder = folder / "cats" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"caption": tfds.features.Text(), "url": tfds.features.Scalar(np.int64)})
    identity = tfds.core.DatasetIdentity(
        name="cats", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, description="")
    info.set_file_format("tfrecord")
    entries = []
    for split in splits:
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="cats", split=split, filetype_suffix="tfrecord"
        )
        parts = [lines[:1], lines[1:]] if split == "train" else [lines[:1], lines[:1]]
        for number, part in enumerate(parts):
            name = f"cats-{split}.tfrecord-{number:05d}-of-00002"
            (folder / name).write_bytes(b"".join(framing.frame(example(line)) for line in part))
        entries.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[len(p) for p in parts], num_bytes=1, filename_template=template
            )
        )
    info.set_splits(tfds.core.SplitDict(entries))
    info.write_to_directory(folder)
    return folder


def example(line):
    from tensorflow_datasets.proto import tf_example_pb2

    proto = tf_example_pb2.Example()
    proto.features.feature["caption"].bytes_list.value.append(line if isinstance(line, bytes) else line.encode())
    return proto.SerializeToString()


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_tfds])
def test_every_source_gives_the_same_prompts(write, tmp_path):
    prompts = read_prompts(write(tmp_path), 2, "caption")
    assert prompts.lines == PROMPTS
    assert prompts.distinct == 3
    assert [prompts[i] for i in (0, 1, 2, 7, 8)] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[3], PROMPTS[0]]
    plain = PROMPTS[:3]
    assert read_prompts(write_text(tmp_path, plain)).lines == plain
    again = tmp_path / "again"
    again.mkdir()
    assert read_prompts(write(again, plain), 1, "caption").digest() == read_prompts(tmp_path / "prompts.txt").digest()


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "binary"])
def test_parquet_kinds_of_text(kind, tmp_path):
    assert read_prompts(write_parquet(tmp_path, PROMPTS, kind), 1, "caption").lines == PROMPTS


def write_coco(folder, lines=PROMPTS):
    file = folder / "captions_val2014.JSON"
    rows = [{"image_id": i, "id": 7 + i, "caption": line} for i, line in enumerate(lines)]
    file.write_text(json.dumps({"info": {}, "images": [], "annotations": rows}), encoding="utf-8")
    return file


def write_objects(folder, lines=PROMPTS):
    file = folder / "prompts.json"
    file.write_text(json.dumps([{"caption": line} for line in lines]), encoding="utf-8-sig")
    return file


def write_csv(folder, lines=PROMPTS, name="prompts.csv", delimiter=","):
    file = folder / name
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([("url", "caption"), *enumerate(lines)])
    return file


def write_tsv(folder, lines=PROMPTS):
    return write_csv(folder, lines, "prompts.TSV", "\t")


def write_parts(folder, lines=PROMPTS):
    folder = folder / "parts"
    folder.mkdir()
    for number, line in enumerate(lines):
        write_parquet(folder, [line]).rename(folder / f"train-{number * 7}.parquet")
    (folder / "README.md").write_text("a data set")
    return folder


@pytest.mark.parametrize("write", [write_coco, write_objects, write_csv, write_tsv, write_parts])
def test_files_as_data_sets_come(write, tmp_path):
    source = write(tmp_path)
    assert read_prompts(source, 1, "caption").lines == PROMPTS
    with pytest.raises(UserError, match=r"--prompts-column is empty; it has .*caption"):
        read_prompts(source, asked="--prompts-column")


def test_a_list_of_texts_has_no_column(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    assert read_prompts(tmp_path / "a.json").lines == PROMPTS
    with pytest.raises(UserError, match="has no columns"):
        read_prompts(tmp_path / "a.json", 1, "caption")


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(name, tmp_path):
    (tmp_path / name).write_bytes("\ufeffthe cat\r\nthe dog\r\n".encode())
    assert read_prompts(tmp_path / name).lines == ("the cat", "the dog")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", b"<a/>", r"\.xml files are not read as prompts; give \.txt, "),
        ("a.csv.gz", b"", r"\.gz files are not read"),
        ("a.txt", b"x" * 30_000, "line 1 is no prompt but 30000 characters"),
        ("a.txt", b"a\0b", "line 1 is no prompt"),
        ("a.json", b'{"captions": []}', "neither a list of prompts nor captions of COCO"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "no JSON .*one object per line is a .jsonl file"),
        ("a.csv", b'a,"caption', "cannot be read as CSV"),
        ("x" * 300, None, "No such file"),
        ("gs://bucket/a.txt", None, "an address"),
    ],
)
def test_files_of_another_kind(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(name if content is None else tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "row"), [("a.csv", "a red 7, bold"), ("a.csv", "'a red 7, bold, on white'"), ("a.tsv", "a red\t7")]
)
def test_a_text_that_is_not_quoted_is_not_cut_off(name, row, tmp_path):
    file = tmp_path / name
    file.write_text(f"caption\na blue 4\n{row}\n")
    with pytest.raises(UserError, match=r"a\..sv: line 3 has more fields than the header's 1; quote text that holds '"):
        read_prompts(file, 1, "caption")


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_empty_prompts_are_counted_at_once_or_left_out(write, tmp_path):
    source = write(tmp_path, ("one", "", " ", "two", ""))
    with pytest.raises(UserError, match=r"\w+ [12] is empty and so are 2 more of 5; .*pairs\.skip_empty=True"):
        read_prompts(source, 1, "caption")
    assert read_prompts(source, 1, "caption", skip_empty=True).lines == ("one", "two")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_an_emoji_is_named(name, tmp_path):
    row = b'{"caption": "a \\ud83d"}'
    (tmp_path / name).write_bytes(row if name == "a.jsonl" else b"[" + row + b"]")
    with pytest.raises(UserError, match=r"(line 1|row 0) holds half a character"):
        read_prompts(tmp_path / name, 1, "caption")


def test_a_line_break_in_a_prompt_is_a_space(tmp_path):
    assert read_prompts(write_coco(tmp_path, ("bold\n7", "a\r\nb")), 1, "caption").lines == ("bold 7", "a b")


def test_digest_knows_where_a_prompt_ends(tmp_path):
    two, one = (read_prompts(write_jsonl(tmp_path, lines), 1, "caption").digest() for lines in (("a", "b"), ("a\nb",)))
    assert two != one


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_tfds])
def test_columns_that_are_not_there_are_named(write, tmp_path):
    source = write(tmp_path)
    with pytest.raises(UserError, match=r"no column 'text'; it has .*caption"):
        read_prompts(source, 1, "text")
    with pytest.raises(UserError, match=r"column is empty; it has .*caption"):
        read_prompts(source)


def test_a_text_file_has_no_columns(tmp_path):
    with pytest.raises(UserError, match="has no columns"):
        read_prompts(write_text(tmp_path), 1, "caption")


@pytest.mark.parametrize(
    ("write", "line", "message"),
    [
        (write_jsonl, " ", "line 3 is empty"),
        (write_jsonl, None, "line 3 is empty"),
        (write_jsonl, 7, "line 3 holds int"),
        (write_parquet, "", "row 2 is empty"),
        (write_parquet, None, "row 2 is empty"),
        (write_tfds, "", "record 2 is empty"),
        (write_tfds, b"cat \xff", "record 2 is not UTF-8 at its byte 4"),
    ],
)
def test_prompts_that_are_none(write, line, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(write(tmp_path, ("one", "two", line)), 1, "caption")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no prompts in it"),
        ("a.jsonl", b'{"caption": "a"}\n\n{"caption": "b"}\n', "line 2 is no JSON"),
        ("a.jsonl", b'{"caption": "a"}\n[1]\n', "line 2 holds list"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl", b'{"caption": "a"}\n{"text": "b"}\n', "line 2: no column 'caption'; it has text"),
        ("a.jsonl", b'{"caption": "a\xff"}\n', "not UTF-8 at byte 14"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.parquet", None, "No such file"),
        ("a.jsonl", None, "No such file"),
    ],
)
def test_broken_files(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name, 1, "caption")
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_that_is_no_text_or_not_utf8(tmp_path):
    with pytest.raises(UserError, match="column 'url' is int64, no text"):
        read_prompts(write_parquet(tmp_path), 1, "url")
    with pytest.raises(UserError, match="row 1 is not UTF-8 at its byte 3"):
        read_prompts(write_parquet(tmp_path, (b"cat", b"dog\xff"), "binary"), 1, "caption")
    empty = write_parquet(tmp_path, ())
    with pytest.raises(UserError, match="no prompts"):
        read_prompts(empty, 1, "caption")


def test_broken_tfds_folders(tmp_path):
    with pytest.raises(UserError, match="not a folder that TFDS prepared"):
        read_prompts(tmp_path, 1, "caption")
    folder = write_tfds(tmp_path)
    file = folder / "dataset_info.json"
    info = file.read_text()
    file.write_text(info[:-20])
    with pytest.raises(UserError, match="not a folder that TFDS prepared"):
        read_prompts(folder, 1, "caption")
    file.write_text(info)
    shard = folder / "cats-train.tfrecord-00001-of-00002"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    with pytest.raises(UserError, match=r"00001-of-00002: corrupt at byte [1-9]"):
        read_prompts(folder, 1, "caption")
    shard.write_bytes(framing.frame(example("a")))
    with pytest.raises(UserError, match=r"1 records, dataset_info\.json has 3"):
        read_prompts(folder, 1, "caption")
    shard.unlink()
    with pytest.raises(UserError, match="00001-of-00002: cannot be read"):
        read_prompts(folder, 1, "caption")
    other = write_tfds(tmp_path / "other", splits=("test", "validation"))
    with pytest.raises(UserError, match="none is train"):
        read_prompts(other, 1, "caption")


def test_neither_tensorflow_nor_torch_is_imported(tmp_path):
    folder = write_tfds(tmp_path)
    script = (
        "import sys; from d2g_jax.pairs.prompts import read_prompts; read_prompts(sys.argv[1], 1, 'caption')\n"
        "bad = {'tensorflow', 'torch'} & sys.modules.keys(); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
