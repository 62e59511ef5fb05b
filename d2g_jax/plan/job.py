"""The plan job: one config and one topology as text and as JSON; or written plans as a table."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from d2g_jax.inputs.numbers import COUNT
from d2g_jax.plan import sampling, store
from d2g_jax.plan.plan import Plan, from_json, to_json
from d2g_jax.plan.planner import find_fit, plan_run
from d2g_jax.plan.report import format_plan, format_sampling, format_search, format_table
from d2g_jax.plan.targets import Target, check_libtpu, parse_topology
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import started
from d2g_jax.train.setup import check_mismatches


def start(topology: str, method: str) -> Target:
    """The target; keeps JAX on the host's CPU. Before the first use of a device."""
    target = parse_topology(topology)
    if target.chip.platform == "tpu" and method == "compile":
        check_libtpu(target)
    jax.config.update("jax_platforms", "cpu")
    started()
    if target.chip.platform == "cpu":
        try:
            meshes.use_cpu_devices(target.count)
        except RuntimeError as error:
            raise UserError(f"--topology={topology}: this process has {jax.device_count()} CPU devices") from error
    return target


def make_report(
    config: ml_collections.ConfigDict, target: Target, method: str, *, search: bool
) -> tuple[str, dict[str, Any]]:
    """The plan as text and as plain values for JSON; with `search`, where it does not fit, also what does.

    Raises `UserError` where mix-and-match would find no neighbour, as training does.
    """
    check_mismatches(config)
    plan = plan_run(config, target, method)
    text, found, tried = format_plan(plan), None, []
    if search and not plan.fits:
        found, tried = find_fit(config, target, method)
        text += "\n\n" + format_search(plan, found, tried)
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": store.versions(),
        "topology": target.topology,
        "plan": to_json(plan),
        "found": None if found is None else to_json(found),
        "tried": [to_json(other) for other in tried],
    }
    return text, report


def make_sampling_report(
    model: str, target: Target, dtype: str, batches: Sequence[int], method: str
) -> tuple[str, dict[str, Any]]:
    """One-step sampling of each batch on one device of the target, as text and as plain values for JSON.

    Raises `UserError` for any impossible batch before the first is planned, and as `plan_sampling`.
    """
    for batch in batches:
        COUNT.check("--batches", batch)
    plans = [sampling.plan_sampling(model, target, dtype, batch, method) for batch in batches]
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": store.versions(),
        "topology": target.topology,
        "sampling": [sampling.to_json(plan) for plan in plans],
    }
    return format_sampling(plans), report


def table(files: Sequence[Path]) -> str:
    """The plans of JSON files as Markdown: of each the one that fits, or the one that was asked for."""
    return format_table([_chosen(file) for file in files])


def _chosen(file: Path) -> tuple[Plan, str]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return from_json(report["found"] or report["plan"]), report["topology"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a plan that `d2g plan --out` wrote ({error})") from error
