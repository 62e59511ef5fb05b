"""One-step sampling planned on one device: against the shapes of what is stored, the compiler, and its own parts."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
import tiny_images
from test_plan_job import VAE

from d2g_jax.__main__ import main
from d2g_jax.plan import architectures, job, programs
from d2g_jax.plan.sampling import plan_sampling
from d2g_jax.plan.targets import CHIPS, Target, parse_topology

H100 = Target("gpu:1xH100", CHIPS["H100"], 1)
TINY = {"vae": VAE | {"layers_per_block": 1}, "unet": {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2, "mid_block_type": None,
}}  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(programs.store, "folder", lambda: tmp_path / "store")
    monkeypatch.setitem(architectures.KNOWN, "tiny/tiny", ("sd1", TINY))


def stored_bytes(params, width):
    """Kernels and embeddings take `width` bytes a number, norms and biases four."""
    of_kind = {"kernel": width, "embedding": width}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size * of_kind.get(path[-1].key, 4) for path, leaf in leaves)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_weights_are_counted_as_they_are_stored(dtype, width):
    plan = plan_sampling("tiny/tiny", H100, dtype, 2, "formula")
    text, network, _ = plan.programs
    pipeline = architectures.abstract_pipeline("tiny/tiny")
    ids, noise = 2 * 77 * 4, 2 * 4 * 8 * 8 * 4
    assert text.argument_bytes == stored_bytes(pipeline.params["text_encoder"], width) + ids
    assert network.argument_bytes == stored_bytes(pipeline.params["unet"], width) + noise + text.output_bytes
    assert text.output_bytes == 2 * 77 * 768 * width


def test_a_batch_has_the_flops_of_its_images_and_less_traffic():
    one, eight = (plan_sampling("tiny/tiny", H100, "bfloat16", batch, "formula") for batch in (1, 8))
    for small, large in zip(one.programs, eight.programs, strict=True):
        assert large.cost.flops == pytest.approx(8 * small.cost.flops, rel=0.01)
        assert small.cost.memory_bytes < large.cost.memory_bytes < 8 * small.cost.memory_bytes
    floors = eight.floors()
    assert floors["all"]["seconds"] == sum(floors[name]["seconds"] for name in ("text", "unet", "vae"))
    assert all(0 < floor["products"] <= floor["seconds"] for floor in floors.values())


def test_what_fits_is_all_weights_all_code_and_the_largest_temporaries():
    plan = plan_sampling("tiny/tiny", H100, "bfloat16", 2, "formula")
    needed = sum(p.argument_bytes + p.code_bytes for p in plan.programs)
    needed += max(p.temp_bytes + p.output_bytes for p in plan.programs)
    assert plan.total_bytes() == needed
    for memory, fits in ((needed, True), (needed - 1, False)):
        chip = dataclasses.replace(H100.chip, memory_bytes=memory)
        assert dataclasses.replace(plan, target=dataclasses.replace(H100, chip=chip)).fits is fits


def test_the_host_s_compiler_agrees_on_arguments_and_results():
    compiled = plan_sampling("tiny/tiny", parse_topology("cpu:1"), "float32", 2, "compile")
    formula = plan_sampling("tiny/tiny", parse_topology("cpu:1"), "float32", 2, "formula")
    assert (compiled.method, formula.method) == ("compiled", "formula")
    assert compiled.floors() is None  # no published peaks of this host
    for exact, counted in zip(compiled.programs, formula.programs, strict=True):
        pointers = 16 if exact.name == "vae" else 0  # its result is a tuple of two
        assert exact.output_bytes == counted.output_bytes + pointers
        assert exact.argument_bytes == counted.argument_bytes
        assert exact.temp_bytes > 0
        assert exact.cost.flops == counted.cost.flops


def test_the_command_prints_and_writes(capsys, tmp_path):
    file = tmp_path / "plan.json"
    flags = ["--topology=gpu:1xL4", "--model=tiny/tiny", "--batches=1,4"]
    assert main(["plan", "sample", *flags, f"--out={file}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one-step sampling, tiny/tiny, bfloat16, one device of gpu:1xL4; by formula, not compiled"
    assert [line.split(" | ")[0] for line in lines[4:12]] == [
        f"| {part} x{batch}" for batch in (1, 4) for part in ("text", "unet", "vae", "all")
    ]
    assert lines[-1].endswith("GiB: fits")
    assert [plan["fits"] for plan in json.loads(file.read_text())["sampling"]] == [True, True]
    assert main(["plan", "sample", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["topology"] == "gpu:1xL4"


def test_a_teacher_of_images_has_no_towers_to_time(tmp_path, capsys):
    folder = tiny_images.make(tmp_path / "teacher", tiny_images.NOTHING)
    assert main(["plan", "sample", "--topology=gpu:1xL4", f"--model={folder}", "--batches=1"]) == 0
    assert "| text x1 | 0.00 | 0.00 | 0.0 | 0.00 | - | - | - |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--dtype=int8", "--dtype='int8': choose float32 or bfloat16"),
        ("--batches=4,0", "--batches=0; give a whole number from 1"),
        (f"--model={Path(__file__).parent}", ": no pipeline folder; give one, of a student its teacher's, or digits, "),
        ("--batches=four", "argument --batches: invalid numbers value: 'four'"),
        ("--model=nobody/nothing", "neither a local folder nor a model whose shapes are known"),
    ],
)
def test_bad_flags_are_one_line(flag, says, capsys, monkeypatch):
    monkeypatch.setattr(job.sampling, "SamplingPlan", lambda *_: pytest.fail("planned before all is checked"))
    assert main(["plan", "sample", "--topology=gpu:1xL4", "--model=tiny/tiny", flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.slow
def test_compiled_for_a_tpu_that_is_not_there(libtpu):
    plan = plan_sampling("tiny/tiny", parse_topology("v5e:1x1"), "bfloat16", 2, "compile")
    assert plan.method == "compiled"
    assert plan.fits
    assert all(p.code_bytes > 0 and p.cost.memory_bytes > 0 for p in plan.programs)
    assert plan.floors()["all"]["seconds"] > 0
