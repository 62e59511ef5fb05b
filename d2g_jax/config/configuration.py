"""A configuration file with `--config.key=value` flags applied to it."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2g_jax.config.ranges import check_ranges, range_of
from d2g_jax.inputs import places
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.runs import flatten


def read_config(file: Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """The config of `file` (None: the digits) with flags such as `--config.train.images=1000` applied.

    Raises `UserError` for a file without `get_config()` or with an error in it, an unknown key, a value of the wrong
    type and a number out of its range (`ranges.RANGES`).
    """
    from absl import flags
    from ml_collections import config_flags

    config = load_config(file or Path(__file__).parents[1] / "digits" / "config.py")
    for override in overrides:
        key, equals, _ = override.removeprefix("--config.").partition("=")
        _check_key(config, key)
        if not equals:
            raise UserError(f"{override}: give the value behind an equals sign, {override}=VALUE")
    values, command = flags.FlagValues(), ["d2g", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
        values(command)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_of_flag(str(error))) from error
    check_ranges(values.config)
    _expand_homes(values.config)
    return values.config


def with_settings(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a config with changes such as {"train.remat": "full"}."""
    changed = copy.deepcopy(config)
    with changed.unlocked():
        changed.update_from_flattened_dict(dict(changes))
    return changed


def _expand_homes(config: Any) -> None:
    """`~/x` in a setting is a path below the home, which no shell has seen."""
    for key, value in flatten(config.to_dict()).items():
        if isinstance(value, str) and value.startswith("~/"):
            config.update_from_flattened_dict({key: str(places.expanded(value))})


def _of_flag(error: str) -> str:
    """absl's message of a value that a setting does not take, in words where the setting is a number."""
    flag = re.search(r"flag --config\.([\w.]+)=(.*?): ", error)
    allowed = range_of(flag[1]) if flag else None
    return f"{flag[1]}={flag[2]}; give {allowed}" if allowed is not None else f"config: {' '.join(error.split())}"


def compute_dtype(key: str, name: str) -> Any:
    """The numpy dtype that the setting `key` names for arithmetic; raises `UserError` for any but these two."""
    import jax.numpy as jnp

    if name not in ("float32", "bfloat16"):
        raise UserError(f"{key}={name!r}: choose float32 or bfloat16")
    return jnp.dtype(name)


def _check_key(config: Any, key: str) -> None:
    """Raises `UserError` for a setting that does not exist, with the nearest one that does."""
    known = list(flatten(config.to_dict()))
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1)
        raise UserError(f"--config.{key}: no such setting" + (f"; did you mean {nearest[0]}?" if nearest else ""))


def load_config(file: Path) -> Any:
    """What `get_config()` of a Python file returns."""
    from ml_collections import ConfigDict

    if not file.is_file():
        wrong = "a folder" if file.is_dir() else "no such file"
        raise UserError(f"--config={file}: {wrong}; give a Python file with get_config()")
    spec = importlib.util.spec_from_file_location("d2g_config", file)
    if spec is None:
        raise UserError(f"--config={file}: not a Python file; give one with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except UserError:
        raise
    except Exception as error:  # the file is somebody's program and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--config={file}{_line_of(error, file)}: {reason}; correct the file") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={file}: has no get_config(); see configs/digits.py")
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"--config={file}: get_config() returns a {kind}, not a ConfigDict; see configs/digits.py")
    return config


def _line_of(error: Exception, file: Path) -> str:
    """`, line 3`: the last line of `file` that had a part in the error; "" where none had."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    lines = [line for name, line in places if Path(name).resolve() == file.resolve() and line]
    return f", line {lines[-1]}" if lines else ""
