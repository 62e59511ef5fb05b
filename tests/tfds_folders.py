"""Folders as TFDS prepares them, written without it."""

import io
import json

from d2g_jax.records.framing import frame


def example(image, label):
    from tensorflow_datasets.proto import tf_example_pb2

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    record = tf_example_pb2.Example()
    record.features.feature["image"].bytes_list.value.append(buffer.getvalue())
    record.features.feature["label"].int64_list.value.append(label)
    return record.SerializeToString()


def write_tfds(folder, file_format, records, lengths=(2, 3)):
    folder.mkdir()
    pixels = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8", "encodingFormat": "png"}
    features = {
        "image": {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image", "image": pixels},
        "label": {
            "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "2"},
        },
    }
    tree = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    (folder / "features.json").write_text(json.dumps({**tree, "featuresDict": {"features": features}}))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "train", "shardLengths": [str(n) for n in lengths], "filepathTemplate": template}
    info = {"name": "toy", "version": "1.0.0", "fileFormat": file_format, "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "label.labels.txt").write_text("blue\nred\n")
    for shard, part in enumerate((records[: lengths[0]], records[lengths[0] :])):
        file = folder / f"toy-train.{file_format}-{shard:05d}-of-{len(lengths):05d}"
        if file_format == "tfrecord":
            file.write_bytes(b"".join(frame(data) for data in part))
        else:
            from array_record.python.array_record_module import ArrayRecordWriter

            writer = ArrayRecordWriter(str(file), "group_size:1")
            for data in part:
                writer.write(data)
            writer.close()
    return folder
