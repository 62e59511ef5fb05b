"""Real TensorFlow and TFDS read what we write."""

import warnings

import numpy as np
import pytest

from d2g_jax import records

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TensorFlow's own imports
    tf = pytest.importorskip("tensorflow")
    import tensorflow_datasets as tfds

pytestmark = pytest.mark.filterwarnings("ignore")  # of TensorFlow's; ours are errors in the other files


def test_tfrecord_dataset_checks_our_checksums(folder, manifest):
    path = folder / records.shard_name(1, 3)
    assert len(list(tf.data.TFRecordDataset(str(path)))) == 8
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(tf.errors.DataLossError):
        list(tf.data.TFRecordDataset(str(path)))


@pytest.mark.parametrize(
    "changes", [{}, {"latent_dtype": "bfloat16", "store_noise": True, "text_shapes": {"text_embeds": [3]}}]
)
def test_tfds_reads_the_folder(tmp_path, pairs, changes):
    manifest = pairs.manifest_with(**changes)
    folder = pairs.write_folder(tmp_path / "pairs" / "1.0.0", manifest)
    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].num_examples == 23
    assert builder.info.full_name == "pairs/1.0.0"
    examples = list(tfds.as_numpy(builder.as_dataset(split="train", shuffle_files=False)))
    assert sorted(int(example["id"]) for example in examples) == list(range(23))
    for example in examples:
        expected = pairs.make_record(manifest, int(example["id"]))
        assert example.keys() == expected.keys()
        assert example.pop("prompt").decode() == expected["prompt"]
        for name, value in example.items():
            np.testing.assert_array_equal(value, expected[name])


def test_tensorflows_example_reads_ours(folder, manifest, pairs):
    (first, *_) = tf.data.TFRecordDataset(str(folder / records.shard_name(0, 3)))
    feature = tf.train.Example.FromString(first.numpy()).features.feature
    assert feature["id"].int64_list.value[:] == [0]
    latents = tf.io.decode_raw(feature["latents"].bytes_list.value[0], tf.float16)
    np.testing.assert_array_equal(tf.reshape(latents, (2, 4, 3)), pairs.make_record(manifest, 0)["latents"])
