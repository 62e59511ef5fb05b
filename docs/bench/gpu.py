"""All that docs/bench.md has not measured on one NVIDIA GPU, the most important first, within nine minutes.

    python docs/bench/gpu.py --out=bench_gpu               on the machine with the GPU; needs torch and diffusers there
    python docs/bench/gpu.py --out=bench_cpu --rehearse    the same parts with tiny networks, wherever it is

Each part is a `d2g bench` in a process of its own, with a limit of its own. After each, DIR/gpu.json and DIR/gpu.md say
what there is so far, with every bar met, MISSED or not reached, so that a run that is cut short is a result too.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 540
LEAST = 20  # a part is not begun with fewer left
REHEARSAL = 10  # times its limit a part has where a laptop's cores may be busy with something else
TOPOLOGIES = ("H100", "H200", "A100-80G", "L4", "RTX4090")
"""As `d2g plan --topology=gpu:1x...` knows them, by what JAX calls the device without its spaces and dashes."""

# The plan's setting for one H100 (docs/hardware.md), in steps of 16 images, so that a loop of 16 takes seconds.
SD15 = (
    "--config=configs/sd15.py", "--config.mesh.fsdp=1", "--config.train.remat=none", "--config.train.micro_batch=8",
    "--config.train.r1_micro_batch=1", "--config.train.batch_size=16", "--config.train.groups=1",
)  # fmt: skip
TINY = ("--config=configs/digits.py", "--config.train.batch_size=16", "--config.train.groups=2")


@dataclasses.dataclass(frozen=True)
class Part:
    """`d2g bench` with `flags`; `tiny` takes their place in a rehearsal."""

    name: str
    flags: tuple[str, ...]
    tiny: tuple[str, ...]
    limit: float


PARTS = (
    Part("train", ("train", *SD15, "--repeats=1", "--no-torch"), ("train", *TINY, "--repeats=1", "--no-torch"), 210),
    Part("sample", ("sample", "--batches=1,8", "--repeats=3"), ("sample", "--model=digits", "--repeats=1"), 210),
    Part("loss-512", ("loss", "--size=512", "--repeats=3"), ("loss", "--size=64", "--repeats=1"), 60),
    Part("sdxl", ("sample", "--model=sdxl", "--batches=1,8", "--repeats=2"),
         ("sample", "--model=digits", "--batches=2", "--repeats=1"), 180),
    Part("pairs", ("pairs", "--model=sd15", "--batch=8", "--steps=10", "--repeats=1"),
         ("pairs", "--batch=2", "--steps=2", "--repeats=1"), 120),
    Part("loss-1024", ("loss", "--size=1024", "--repeats=2", "--dtype=bfloat16"),
         ("loss", "--size=64", "--repeats=1", "--dtype=bfloat16"), 60),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--rehearse", action="store_true", help="tiny networks in the parts' place")
    own = parser.parse_args(arguments)
    own.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    device = _device()
    topology = next(
        (name for name in TOPOLOGIES if name.replace("-", "") in device.replace(" ", "").replace("-", "")), None
    )
    if not own.rehearse and topology is None:
        print(f"{device}: none of {', '.join(TOPOLOGIES)}; --rehearse runs tiny networks here", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"device": device, "date": datetime.date.today().isoformat(), "rehearsal": own.rehearse}
    result |= {"plan": None, "parts": {}}
    planning = None if own.rehearse else _begin_plan(topology, own.out)
    for part in PARTS:
        left = own.seconds - (time.monotonic() - begun)
        limit = part.limit * (REHEARSAL if own.rehearse else 1)
        result["parts"][part.name] = _run(part, own.out, min(limit, left), own.rehearse)
        result["plan"] = _planned(own.out) if planning else None
        (own.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (own.out / "gpu.md").write_text(table(result), encoding="utf-8")
    if planning:
        planning.kill()  # which ends nothing that has ended
    print(table(result))
    return 0


def _device() -> str:
    """What JAX calls its first device: asked in a process that gives the device back."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _begin_plan(topology: str, out: Path) -> subprocess.Popen:
    """`d2g plan`, by formula, of the part "train": on the host's cores, beside the first parts."""
    command = ["plan", *SD15, f"--topology=gpu:1x{topology}", "--no-search", f"--out={(out / 'plan.json').resolve()}"]
    (out / "plan.json").unlink(missing_ok=True)
    with (out / "plan.log").open("w", encoding="utf-8") as log:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            [sys.executable, "-m", "d2g_jax", *command], cwd=ROOT, env=environment, stdout=log, stderr=log
        )


def _planned(out: Path) -> dict[str, float] | None:
    """What the plan says, once it is there."""
    if not (out / "plan.json").is_file():
        return None
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))["plan"]
    return {"images_per_second": plan["images_per_second_per_chip"]["predicted"], "bytes": plan["total_bytes"]}


def _run(part: Part, out: Path, limit: float, rehearse: bool) -> dict[str, Any]:
    """How the part ended, its seconds, and its report where it came to its end."""
    file = (out / f"{part.name}.json").resolve()
    command = [sys.executable, "-m", "d2g_jax", "bench", *(part.tiny if rehearse else part.flags), f"--out={file}"]
    found = {"command": " ".join(command[1:-1]), "limit": round(limit), "report": None}
    if limit < LEAST:
        return {**found, "outcome": "not reached", "seconds": 0.0}
    file.unlink(missing_ok=True)
    begun = time.monotonic()
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            outcome = "done" if process.wait(limit) == 0 else f"failed with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # compilers of its own too
            process.wait()
            outcome = "cut short"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return {**found, "outcome": outcome, "seconds": round(time.monotonic() - begun, 1), "report": report}


def table(result: dict[str, Any]) -> str:
    """Markdown: the parts with their bars, and the plan beside what was measured."""
    lines = [f"# {result['device']}, {result['date']}{', a rehearsal' if result['rehearsal'] else ''}", ""]
    lines += ["| part | ended | s | bar | figure | |", "| --- | --- | --- | --- | --- | --- |"]
    for name, part in result["parts"].items():
        bars = part["report"]["bars"] if part["report"] else [{"claim": "", "measured": None, "met": None}]
        for bar in bars:
            figure = "" if bar["measured"] is None else f"{bar['measured']:.4g}"
            word = {True: "met", False: "MISSED", None: "not reached"}[bar["met"]]
            lines.append(f"| {name} | {part['outcome']} | {part['seconds']} | {bar['claim']} | {figure} | {word} |")
    train = result["parts"].get("train", {}).get("report")
    if train and result["plan"]:
        rate = next(
            (row["value"] for row in train["rows"] if row["name"].startswith("iteration, e_latent_lpips")), None
        )
        peak = max((row["peak_bytes"] or 0 for row in train["rows"]), default=0)
        lines += ["", "| beside the plan | planned | measured |", "| --- | --- | --- |"]
        lines.append(
            f"| images/s | {result['plan']['images_per_second']:.1f} | {'-' if rate is None else f'{rate:.1f}'} |"
        )
        lines.append(f"| GiB of the largest step | {result['plan']['bytes'] / 2**30:.1f} | {peak / 2**30:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
