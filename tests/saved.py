"""What a checkpoint holds, read with Orbax alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def trees(checkpoints: Path) -> dict[str, Any]:
    """The newest checkpoint's trees `state` and `ema` as they were saved, on the host."""
    newest = max((folder for folder in checkpoints.iterdir() if folder.name.isdigit()), key=lambda f: int(f.name))
    found = {}
    for name in ("state", "ema"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(newest / name).item_metadata.tree
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            found[name] = checkpointer.restore(newest / name, args=ocp.args.PyTreeRestore(restore_args=on_host))
    return found


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of a workdir's newest checkpoint by its path."""
    found = trees(workdir / "checkpoints")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
