"""TensorBoard and wandb: what is written under which step, and that neither is needed without its option."""

import importlib.util
import itertools
import json
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_journal import metrics, opened, state
from tiny import get_config

from d2g_jax.records.framing import scan, unframe
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.grid import save_png
from d2g_jax.train import train
from d2g_jax.train.trackers import check_trackers, open_trackers


def config(**train):
    settings = {"batch_size": 8, "keep_best": "", "skip_nonfinite": 0, "tensorboard": False, "wandb": "", **train}
    return ConfigDict({"name": "a", "seed": 3, "train": settings})


def run_steps(journal):
    """Four steps of 8 images, two lines; the loss of the first is 3 on average."""
    for images, loss in ((8, 2.0), (16, 4.0), (24, 1.0), (32, 1.0)):
        journal.add(images, metrics(loss))
        if images % 16 == 0:
            journal.write_line(images, state(images), {})


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is told."""
    module = types.ModuleType("wandb", doc="stand-in")
    module.told = []
    module.Image = lambda file: ("image", file)

    class Run:
        def log(self, values, step):
            module.told.append((step, values))

        def finish(self):
            module.told.append("finished")

    def init(**options):
        module.options = options
        return Run()

    module.init = init
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_without_options_nothing_is_imported(tmp_path, monkeypatch):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # an import of it would raise
    check_trackers(config().train)
    assert open_trackers(config(), tmp_path, 0) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "package"), [("tensorboard", True, "tensorboardX"), ("wandb", "digits", "wandb")]
)
def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch, option, value, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    settings = get_config()
    settings.train[option] = value
    message = rf"train\.{option}={value!r} needs the package {package}.*pip install 'd2g_jax\[{option}\]'"
    with pytest.raises(UserError, match=message):
        train(settings, tmp_path / "run", tmp_path / "no pairs either")
    assert not (tmp_path / "run").exists()


def test_wandb_is_told_lines_and_grids_by_images(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings = config(wandb="distil")
    check_trackers(settings.train)
    file = picture(tmp_path)
    with opened(tmp_path / "run", settings) as (journal, _, _):
        run_steps(journal)
        journal.add_picture(32, file)
    first, second, grid, end = wandb.told
    assert (first[0], first[1]["images"], first[1]["loss_regression"]) == (16, 16, 3.0)
    assert (second[0], second[1]["images"]) == (32, 32)
    assert grid == (32, {"samples": ("image", str(file))})
    assert end == "finished"
    options = wandb.options
    assert (options["project"], options["mode"], options["resume"]) == ("distil", "offline", None)
    assert options["dir"] == str(tmp_path / "run")
    assert options["config"]["train"]["batch_size"] == 8
    with opened(tmp_path / "run", settings) as (journal, _, _):  # goes on in the same run
        assert wandb.options["resume"] == "allow"
        assert wandb.options["id"] == options["id"]
    monkeypatch.setenv("WANDB_MODE", "online")
    with opened(tmp_path / "other", settings):
        assert wandb.options["mode"] == "online"
        assert wandb.options["id"] != options["id"]


def test_what_is_not_finite_is_left_out_of_wandb(tmp_path, wandb):
    (tracker,) = open_trackers(config(wandb="distil"), tmp_path, 0)
    tracker.add_line(8, {"loss": None, "share": 0.5})
    assert wandb.told == [(8, {"images": 8, "share": 0.5})]


def test_wandb_itself_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))  # the workdir decides
    (tracker,) = open_trackers(config(wandb="distil"), tmp_path, 0)
    tracker.add_line(16, {"loss": 0.5})
    tracker.add_picture(16, picture(tmp_path))
    tracker.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [file.name.split("_")[:2] for file in (run / "files" / "media" / "images").iterdir()] == [["samples", "16"]]
    assert len(list(run.glob("*.wandb"))) == 1


def test_event_files_have_lines_and_grids_by_images(tmp_path):
    pytest.importorskip("tensorboardX")
    settings = config(tensorboard=True)
    check_trackers(settings.train)
    with opened(tmp_path, settings) as (journal, _, _):
        run_steps(journal)
        journal.add_picture(32, picture(tmp_path))
    values = read_events(tmp_path)
    assert [step for step, value in values["loss_regression"]] == [16, 32]
    assert values["loss_regression"][0][1].simple_value == 3.0
    ((step, grid),) = values["samples"]
    assert (step, grid.image.width, grid.image.height) == (32, 6, 4)
    assert json.loads(text_of(values)[7:-3])["seed"] == 3


def test_a_resumed_run_purges_what_it_repeats(tmp_path):
    pytest.importorskip("tensorboardX")
    (tracker,) = open_trackers(config(tensorboard=True), tmp_path, 16)
    tracker.add_line(24, {"loss": 0.5, "not finite": None})
    tracker.close()
    events = list(all_events(tmp_path))
    assert [event.step for event in events if event.session_log.status == 1] == [17]  # 1: START
    values = read_events(tmp_path)
    assert [(step, value.simple_value) for step, value in values["loss"]] == [(24, 0.5)]
    assert "not finite" not in values


def picture(folder):
    file = folder / "grid.png"
    save_png(file, np.zeros((4, 6, 3), np.uint8))
    return file


def all_events(workdir):
    """Of TFRecord files of Event messages, read with our own framing."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted((workdir / "tensorboard").iterdir()):
        data, offsets = file.read_bytes(), scan(file)
        for start, end in itertools.pairwise(offsets):
            yield Event.FromString(unframe(data[start:end]))


def read_events(workdir):
    found = {}
    for event in all_events(workdir):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    return found


def text_of(values):
    ((_, value),) = values["config/text_summary"]
    return value.tensor.string_val[0].decode()
