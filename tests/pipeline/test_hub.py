"""A model by name: which files of a repository are read, and one clear line for every way a fetch can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from d2g_jax.pipeline import hub
from d2g_jax.runtime.errors import UserError

REPO = "runwayml/stable-diffusion-v1-5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def weights(folder: str, stem: str) -> list[str]:
    """Every form in which a component's weights are published."""
    pickle = stem.replace("model", "pytorch_model") if stem == "model" else stem
    return [
        f"{folder}/{name}"
        for name in (
            f"{pickle}.bin", f"{pickle}.fp16.bin", f"{stem}.fp16.safetensors", f"{stem}.safetensors",
            f"{stem}.non_ema.safetensors", f"{pickle}.non_ema.bin",
        )
    ]  # fmt: skip


TOKENIZER = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
SD = [
    ".gitattributes", "README.md", "feature_extractor/preprocessor_config.json", "model_index.json",
    "safety_checker/config.json", *weights("safety_checker", "model"), "scheduler/scheduler_config.json",
    "text_encoder/config.json", *weights("text_encoder", "model"), *(f"tokenizer/{name}" for name in TOKENIZER),
    "unet/config.json", *weights("unet", "diffusion_pytorch_model"), "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "v1-inference.yaml",
    "vae/config.json", *weights("vae", "diffusion_pytorch_model"),
]  # fmt: skip
SD_NEEDED = [
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    *(f"tokenizer/{name}" for name in TOKENIZER), "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip
SDXL = [
    ".gitattributes", "01.png", "LICENSE.md", "README.md", "comparison.png", "model_index.json", "pipeline.png",
    "scheduler/scheduler_config.json", "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors",
    *(
        f"{tower}/{name}"
        for tower in ("text_encoder", "text_encoder_2")
        for name in (
            "config.json", "flax_model.msgpack", "model.fp16.safetensors", "model.onnx", "model.onnx_data",
            "model.safetensors", "openvino_model.bin", "openvino_model.xml",
        )
    ),
    *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in TOKENIZER),
    *(
        f"unet/{name}"
        for name in (
            "config.json", "diffusion_flax_model.msgpack", "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.safetensors", "model.onnx", "model.onnx_data", "openvino_model.bin",
        )
    ),
    "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors", "vae_decoder/config.json",
    "vae_decoder/model.onnx", "vae_encoder/config.json", "vae_encoder/model.onnx",
]  # fmt: skip
SDXL_NEEDED = [
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
    *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in TOKENIZER),
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# ---------------------------------------------------------------------------------------------------------------------
# Which files


@pytest.mark.parametrize(("names", "needed"), [(SD, SD_NEEDED), (SDXL, SDXL_NEEDED)])
def test_files_of_a_repository(names, needed):
    assert hub.needed_files(names) == needed
    assert hub.pickled_networks(names) == []


def test_extras_only_when_asked_for():
    extras = set(hub.needed_files(SD, with_extras=True)) - set(SD_NEEDED)
    assert extras == {
        "feature_extractor/preprocessor_config.json", "safety_checker/config.json", "safety_checker/model.safetensors"
    }  # fmt: skip


def test_half_precision_where_there_is_nothing_else():
    names = [name for name in SD if name != "unet/diffusion_pytorch_model.safetensors"]
    expected = [
        name.replace("unet/diffusion_pytorch_model.", "unet/diffusion_pytorch_model.fp16.") for name in SD_NEEDED
    ]
    assert hub.needed_files(names) == expected


@pytest.mark.parametrize(
    ("variant", "shard"),
    [("", "model-0000{}-of-00002"), (".fp16", "model.fp16-0000{}-of-00002"), (".fp16", "model-0000{}-of-00002.fp16")],
)
def test_shards_come_with_their_index(variant: str, shard: str):
    stem = "unet/diffusion_pytorch_"
    wanted = [f"{stem}model.safetensors.index{variant}.json", *(f"{stem}{shard}.safetensors".format(i) for i in (1, 2))]
    others = [f"{stem}model-00001-of-00004.non_ema.safetensors", f"{stem}model-00001-of-00002.bin"]
    if variant == "":
        others += [f"{stem}model.safetensors.index.fp16.json", f"{stem}model.fp16-00001-of-00002.safetensors"]
    assert hub.needed_files(["unet/config.json", *others, *wanted]) == ["unet/config.json", *wanted]


def test_pickles_are_never_chosen():
    names = [name for name in SD if not name.endswith(".safetensors") or name.startswith("vae/")]
    assert not any(name.endswith((".bin", ".ckpt")) for name in hub.needed_files(names))
    assert hub.pickled_networks(names) == ["text_encoder", "unet"]


# ---------------------------------------------------------------------------------------------------------------------
# Fetching, with a false hub


class FalseHub:
    """Stands in for the two calls that reach the network; `error` is raised instead if it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str], error: Exception | None = None):
        self.names, self.error, self.calls = names, error, []
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, revision: self.info(repo, revision))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name, revision: None)

    def info(self, repo: str, revision: str | None) -> huggingface_hub.ModelInfo:
        self.calls.append(("list", revision))
        if self.error is not None:
            raise self.error
        return huggingface_hub.ModelInfo(id=repo, siblings=[{"rfilename": name} for name in self.names])

    def download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append(("download", repo, revision, allow_patterns))
        return "/cache/snapshot"


def test_exactly_the_needed_files_are_fetched(monkeypatch: pytest.MonkeyPatch):
    false_hub = FalseHub(monkeypatch, SD)
    assert hub.resolve(REPO, "fp16") == Path("/cache/snapshot")
    assert false_hub.calls == [("list", "fp16"), ("download", REPO, "fp16", SD_NEEDED)]


def test_local_paths_are_returned_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Also one that looks like a hub id; nothing is asked of the hub."""
    false_hub = FalseHub(monkeypatch, SD)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.resolve("owner/name") == Path("owner/name")
    assert hub.resolve(tmp_path) == tmp_path
    with pytest.raises(UserError) as error:
        hub.resolve("owner/name", "main")
    one_line(error, "owner/name", "'main'", "local")
    for missing in (tmp_path / "absent", "./absent", "absent", "owner/name/unet", "~/owner"):
        with pytest.raises(UserError) as error:
            hub.resolve(missing)
        one_line(error, f"{missing}: no such folder", "'owner/name'")
    assert false_hub.calls == []


def http_error(kind: type) -> Exception:
    """What the hub's client raises: several lines, and the request behind them."""
    httpx = sys.modules[errors.HTTPError.__module__.partition(".")[0]]
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    return kind("404 Client Error.\n\nRepository Not Found.", response=response)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: http_error(errors.GatedRepoError), ("gated", f"https://huggingface.co/{REPO}", "hf auth login")),
        (lambda: http_error(errors.RepositoryNotFoundError), ("not on the hub", "hf auth login", "'owner/name'")),
        (lambda: http_error(errors.RevisionNotFoundError), ("no revision 'v9'", "branches")),
        (lambda: http_error(errors.HfHubHTTPError), ("cannot be fetched (404 Client Error.)", "--revision v9")),
        (lambda: errors.HTTPError("connection refused"), ("connection refused", "machine with a network")),
        (lambda: errors.OfflineModeIsEnabled("offline mode\nis enabled"), ("(offline mode)", f"hf download {REPO}")),
        (lambda: errors.HFValidationError("Cannot have --"), ("not a hub id (Cannot have --)", "'owner/name'")),
        (lambda: TimeoutError(), ("(TimeoutError)", "--local-dir DIR")),
        (lambda: ValueError("Expecting value"), ("cannot be fetched (Expecting value)",)),
    ],
)  # fmt: skip
def test_failed_fetch_is_one_line(make, words, monkeypatch: pytest.MonkeyPatch):
    FalseHub(monkeypatch, SD, make())
    with pytest.raises(UserError) as error:
        hub.resolve(REPO, "v9")
    one_line(error, f"{REPO}: ", *words)


def test_unfit_repository_is_not_fetched(monkeypatch: pytest.MonkeyPatch):
    for names, words in (
        (["README.md", "model.safetensors"], ("no model_index.json",)),
        ([name for name in SD if not name.endswith(".safetensors")], ("text_encoder and unet and vae", "pickle")),
    ):
        false_hub = FalseHub(monkeypatch, names)
        with pytest.raises(UserError) as error:
            hub.resolve(REPO)
        one_line(error, REPO, *words)
        assert false_hub.calls == [("list", None)]


# ---------------------------------------------------------------------------------------------------------------------
# The real client without a network, in a process of its own: it reads its settings when it is imported


def offline(cache: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    code = (
        "import sys; from d2g_jax.pipeline import hub; from d2g_jax.runtime.errors import UserError\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "for argument in sys.argv[1:]:\n"
        "    try: print(hub.resolve(*argument.split('@')))\n"
        "    except UserError as error: print('UserError', error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)} | settings
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def cached(cache: Path, repo: str, missing: str = "") -> Path:
    """A folder of the hub's cache as a download leaves it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    for name in SD_NEEDED:
        if name != missing:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_text("")
    (snapshot / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "safety_checker": ["a", "B"], "unet": ["diffusers", "X"], '
        '"scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["t", "X"], "tokenizer": ["t", "X"], '
        '"vae": ["diffusers", "X"], "text_encoder_2": [null, null], "requires_safety_checker": true}'
    )
    return snapshot


def test_without_a_network_the_cache_is_read(tmp_path: Path):
    """Whole, by branch and by commit; not whole; another revision; nothing; a local folder."""
    snapshot = cached(tmp_path, REPO)
    cached(tmp_path, "owner/half", "unet/diffusion_pytorch_model.safetensors")
    done = offline(
        tmp_path, REPO, f"{REPO}@main", f"{REPO}@{COMMIT}", "owner/half", f"{REPO}@fp16", "owner/absent", "."
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:3] == [str(snapshot)] * 3
    assert lines[6:] == ["."]
    for line, repo, wanted in zip(
        lines[3:6],
        ("owner/half", REPO, "owner/absent"),
        ("owner/half --local", f"{REPO} --revision fp16 --local", "owner/absent --local"),
        strict=True,
    ):
        assert line.startswith(f"UserError {repo}: no such folder, and not whole in the cache {tmp_path}")
        assert f"on a machine with a network run 'hf download {wanted}-dir DIR'" in line


def test_refused_connection_is_as_good_as_no_network(tmp_path: Path):
    """Not declared offline: the hub's address is a port of this machine on which nobody listens."""
    snapshot = cached(tmp_path, REPO)
    closed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    done = offline(tmp_path, REPO, "owner/absent", **closed)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == str(snapshot)
    assert lines[1].startswith("UserError owner/absent: no such folder, and not whole in the cache")
    assert "refused" in lines[1]


def test_bfloat16_where_there_is_nothing_else():
    names = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bf16.safetensors"]
    assert hub.needed_files(names) == names
    both = [*names, "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert hub.needed_files(both) == [*names[:2], both[-1]]


def test_a_teacher_is_known_by_what_is_read_of_it(tmp_path: Path):
    def write(folder: Path, **files: str) -> Path:
        for name, content in {"model_index.json": "{}", "unet/config.json": "{}", **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        return folder

    weights = {"unet/diffusion_pytorch_model.safetensors": "a"}
    plain = hub.folder_hash(write(tmp_path / "plain", **weights))
    beside = {"notes.txt": "mine", "README.md": "b", "unet/._config.json": "c", "safety_checker/config.json": "{}"}
    assert hub.folder_hash(write(tmp_path / "moved", **weights, **beside)) == plain
    assert hub.folder_hash(write(tmp_path / "other", **{name: "b" for name in weights})) != plain
    assert hub.folder_hash(write(tmp_path / "tuned", **weights, **{"unet/config.json": "{ }"})) != plain


@pytest.mark.parametrize(
    ("key", "default", "other"),
    [("prediction_type", "epsilon", "v_prediction"), ("timestep_spacing", "leading", "trailing"),
     ("rescale_betas_zero_snr", False, True), ("steps_offset", 0, 1)],
)  # fmt: skip
def test_a_schedule_is_known_by_what_is_read_of_it(key, default, other, tmp_path: Path):
    def hashed(**settings: object) -> str:
        file = tmp_path / "scheduler" / "scheduler_config.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "linear", **settings}))
        return hub.folder_hash(tmp_path)

    assert hashed() == hashed(**{key: default}) == hashed(_diffusers_version="0.36.0", clip_sample=False)
    assert hashed() != hashed(**{key: other})
