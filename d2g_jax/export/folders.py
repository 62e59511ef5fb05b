"""Files of a pipeline folder and how they get into another one."""

from __future__ import annotations

import re
import secrets
import shutil
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import needed_files
from d2g_jax.pipeline.single_file import as_folder
from d2g_jax.pipeline.tokenizers import words_of
from d2g_jax.runtime.atomic import TEMPORARY, replacing, writing

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_VARIANT = re.compile(r"\.(?:fp16|bf16)(\.safetensors|\.json)$")
_NAMED_VARIANT = re.compile(rb'\.(?:fp16|bf16)(?=\.safetensors")')
_LICENSE = re.compile(r"(licen[cs]e|notice)([.-].*)?", re.IGNORECASE)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `out` and renames it to `out` once on leaving; removes it when the body raises.

    Raises `UserError` when the disk is full or the place is read-only.
    """
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}{TEMPORARY}")
    with writing(out):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            temporary.replace(out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def source_of(pipeline: Pipeline) -> Iterator[Path]:
    """The folder whose files an export copies: a pipeline's own; of a single file one of its settings, for a while."""
    if pipeline.folder.is_dir():
        yield pipeline.folder
    else:
        with as_folder(settings(pipeline)) as folder:
            yield folder


def settings(pipeline: Pipeline) -> dict[str, Any]:
    """What `kinds/` holds of a kind, of this pipeline."""
    words = dict(zip(("tokenizer", "tokenizer_2"), map(words_of, pipeline.tokenizers), strict=False))
    return {
        "model_index": pipeline.index,
        "scheduler": pipeline.scheduler,
        **{name: network.config.to_json() for name, network in pipeline.networks.items()},
        **words,
    }


def file_names(folder: Path) -> list[str]:
    """Every file of a pipeline folder and of its components' folders, relative to it."""
    return sorted(p.relative_to(folder).as_posix() for p in (*folder.glob("*"), *folder.glob("*/*")) if p.is_file())


def component_files(names: Sequence[str], component: str) -> list[str]:
    """Of `file_names` those that a component needs: its settings, and one set of safetensors where it has any."""
    return [name for name in needed_files(names, with_extras=True) if name.startswith(f"{component}/")]


def settings_files(names: Sequence[str], component: str) -> list[str]:
    """`component_files` without weights."""
    return [name for name in component_files(names, component) if ".safetensors" not in name]


def is_pickled(names: Sequence[str], component: str) -> bool:
    """Whether a component has pickled weights and no safetensors."""
    has_safetensors = any(".safetensors" in name for name in component_files(names, component))
    return not has_safetensors and any(n.startswith(f"{component}/") and n.endswith(_PICKLES) for n in names)


def license_files(names: Iterable[str]) -> list[str]:
    """The licence texts beside a model: most ask to be handed on."""
    return [name for name in names if _LICENSE.fullmatch(name)]


def copy(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copies files byte for byte. A variant gets the plain name, which every loader finds unasked, in its index too."""
    for name in names:
        plain = _VARIANT.sub(r"\1", name)
        with replacing(target / plain) as new:
            shutil.copyfile(source / name, new)
            if plain != name and plain.endswith(".index.json"):
                new.write_bytes(_NAMED_VARIANT.sub(b"", new.read_bytes()))


def filled_in(card: str, description: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """A model card of this folder for a student of this description."""
    template = string.Template(Path(__file__).with_name(card).read_text(encoding="utf-8"))
    return template.substitute({**description, "version": description["versions"]["d2g_jax"], **fields})
