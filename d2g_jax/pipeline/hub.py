"""A model by name: a local folder or file as it is, or of a repository on the Hugging Face hub what we read of it."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from d2g_jax.diffusion import schedule
from d2g_jax.inputs import places, text
from d2g_jax.pipeline.weights import STEMS, VARIANTS
from d2g_jax.runtime.errors import UserError

NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
"""Folders with a config and weights."""

SETTINGS = ("tokenizer", "tokenizer_2", "scheduler")
"""Folders with small text files only."""

EXTRAS = ("safety_checker", "feature_extractor", "image_encoder")
"""Folders that drawing does not need; neither fetched nor loaded."""

_INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REMEDY = "pass a local folder in diffusers' layout, a .safetensors file or a hub id 'owner/name'"


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local folder, or single file, of a model.

    Args:
      model: an existing path, returned as it is, or a hub id "owner/name", fetched into the hub's cache (where that
        is: see huggingface_hub's HF_HOME). Without a network, and for a repository that refuses us, what is cached.
      revision: branch, tag or commit of a hub id; None is the main branch.

    Raises:
      UserError: one line that says what to fetch and where to put it, for no network with nothing in the cache, an
        unknown or gated repository, an unknown revision, a repository without safetensors, and a missing folder.
    """
    name = str(model).removeprefix("https://huggingface.co/") if model else ""
    if not name.strip():
        raise UserError(f"an empty path as a model, as a variable that is not set leaves it; {_REMEDY}")
    if places.is_there(local := places.expanded(name)):
        if revision is not None:
            raise UserError(f"{model}: revision {revision!r} is for hub ids, and this is a local path; leave it out")
        return local
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{places.shown(name)}: no such folder or file; {_REMEDY}")
    return _fetch(name, revision)


def needed_files(names: Sequence[str], with_extras: bool = False) -> list[str]:
    """Of all files of a repository those that `Pipeline.load` reads, in the order of `names`.

    The index, every component's settings, and of each network one set of safetensors as `weights.load_params` would
    choose it: plain before fp16 and bf16, a single file before shards. No pickles, no EMA duplicates, no single-file
    checkpoints. A network that has no safetensors gets its config only (see `pickled_networks`).
    """
    chosen = {_INDEX}
    if not any(name.startswith("unet/") for name in names):  # a teacher of images may have its UNet at the root
        root = [name for name in names if "/" not in name]
        chosen |= {"config.json", "scheduler_config.json", *_weight_files(root)}
    for folder in (*NETWORKS, *SETTINGS, *(EXTRAS if with_extras else ())):
        inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
        settings = [
            name for name in inside if re.fullmatch(r"[\w-][\w.-]*\.(json|txt)", name) and ".index." not in name
        ]
        chosen |= {f"{folder}/{name}" for name in (*settings, *_weight_files(inside))}
    return [name for name in names if name in chosen]


def folder_hash(folder: Path) -> str:
    """SHA-256 (hex) of what is read of a folder: names and bytes, and what `schedule.read_of` says; or of a file."""
    if folder.is_file():
        with folder.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    names = [p.relative_to(folder).as_posix() for p in (*folder.glob("*"), *folder.glob("*/*")) if p.is_file()]
    digest = hashlib.sha256()
    for file in sorted(folder / name for name in needed_files(names)):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        if file.name == "scheduler_config.json":
            digest.update(json.dumps(schedule.read_of(text.read_json(file, "fetch it again"))).encode())
            continue
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def pickled_networks(names: Iterable[str]) -> list[str]:
    """The networks of a repository that are there, but not as safetensors."""
    folders = {name.partition("/")[0] for name in names if "/" in name}
    stored = {name.partition("/")[0] for name in names if name.endswith(".safetensors")}
    return [folder for folder in NETWORKS if folder in folders - stored]


def _weight_files(inside: Sequence[str]) -> list[str]:
    """One set of weights among the files of a component's folder."""
    for variant in VARIANTS:
        for stem in STEMS:
            if (single := f"{stem}{variant}.safetensors") in inside:
                return [single]
            if (index := f"{stem}.safetensors.index{variant}.json") in inside:
                # diffusers wrote the variant behind the number before it wrote it in front
                number, name, label = r"-\d{5}-of-\d{5}", re.escape(stem), re.escape(variant)
                shard = re.compile(rf"{name}({label}{number}|{number}{label})\.safetensors")
                return [index, *(name for name in inside if shard.fullmatch(name))]
    return []


def _fetch(repo: str, revision: str | None) -> Path:
    import huggingface_hub  # only here: half a second that local folders need not pay
    from huggingface_hub.errors import HFValidationError, HTTPError, RevisionNotFoundError  # HTTPError: its library's

    try:
        # not list_repo_files: without a network that retries for half a minute
        files = huggingface_hub.HfApi().model_info(repo, revision=revision).siblings or ()
        names = [file.rfilename for file in files]
        _check(repo, names)
        wanted = [glob.escape(name) for name in needed_files(names)]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except RevisionNotFoundError as error:
        raise UserError(
            f"{repo}: no revision {revision!r} on the hub; give one of its branches, tags, commits"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{repo}: not a hub id ({_first_line(error)}); {_REMEDY}") from error
    except (OSError, HTTPError, ValueError) as error:  # ValueError: an answer that is not JSON, as of a login page
        return _cached(repo, revision, error)


def _check(repo: str, names: Sequence[str]) -> None:
    if _INDEX not in names:
        raise UserError(f"{repo}: has no {_INDEX}, so it is no diffusers pipeline; {_REMEDY}")
    if pickled := pickled_networks(names):
        raise UserError(
            f"{repo}: {' and '.join(pickled)} hold no safetensors, and pickle files are refused because they can run "
            "code; give a revision that has them or convert a local copy"
        )


def _cached(repo: str, revision: str | None, error: Exception) -> Path:
    """The snapshot in the cache; raises what `error` means when there is none or when it is not whole."""
    import huggingface_hub

    index = huggingface_hub.try_to_load_from_cache(repo, _INDEX, revision=revision)
    if isinstance(index, str) and _is_whole(Path(index).parent):
        return Path(index).parent
    raise UserError(_explain(repo, revision, error)) from error


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has something in the folder of every component that its index names, and safetensors."""
    try:
        index = text.read_json(folder / _INDEX, "fetch it again")
    except UserError:
        return False
    at_root = (folder / "config.json").is_file()
    for name in (*NETWORKS, *SETTINGS):
        kind, place = "*.safetensors" if name in NETWORKS else "*", folder if at_root else folder / name
        if (index.get(name) or [None])[0] is not None and not any(place.glob(kind)):
            return False
    return True


def _explain(repo: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/{repo}"
    if isinstance(error, GatedRepoError):
        return f"{repo}: gated; accept its terms at {page}, run 'hf auth login', and try again"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo}: no local folder and not on the hub (a private one needs 'hf auth login'); {_REMEDY}"
    wanted = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    return (
        f"{repo}: no such folder, and not whole in the cache {constants.HF_HUB_CACHE} and cannot be fetched "
        f"({_first_line(error)}); on a machine with a network run '{wanted} --local-dir DIR', copy DIR here and "
        "pass it instead"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
