"""The devices that a plan is made for: what one chip can do at most, and how many there are.

Peaks are published ones, dense, without sparsity; none is measured here. TPU: cloud.google.com/tpu/docs/v5e, /v5p, /v6e
(2026). GPU: NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM, L4 and GeForce RTX 4090.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata

import jax

from d2g_jax.runtime.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      name: as in a topology.
      platform: "tpu", "gpu" or "cpu".
      memory_bytes: what a program may take of the device's memory: as XLA's TPU compiler has it; 95% of a GPU's, which
        needs XLA_PYTHON_CLIENT_MEM_FRACTION=.95; of simulated CPU devices their share of the host's.
      bf16_flops: peak of bfloat16 products, FLOP/s; None where no figure is published.
      float32_flops: peak of products of float32 arrays at JAX's default precision: one bfloat16 pass on TPUs, TF32 on
        GPUs that have it.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s that one chip can receive over all its links (ICI, NVLink) while it sends as much.
    """

    name: str
    platform: str
    memory_bytes: float
    bf16_flops: float | None = None
    float32_flops: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None


def _tpu(name: str, gibibytes: float, flops: float, memory: float, link: float) -> Chip:
    return Chip(name, "tpu", gibibytes * GIB, flops * 1e12, flops * 1e12, memory * 1e9, link * 1e9)


def _gpu(name: str, mebibytes: int, bf16: float, tf32: float, memory: float, link: float) -> Chip:
    return Chip(name, "gpu", 0.95 * mebibytes * 2**20, bf16 * 1e12, tf32 * 1e12, memory * 1e9, link * 1e9)


# Of links the published sum of both directions is halved: v5e 400, v5p 1200, v6e 800 GB/s; NVLink 900 and 600 GB/s;
# L4 and RTX 4090 have PCIe 4.0 x16 alone.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 15.75, 197, 819, 200),
        _tpu("v5p", 95.74, 459, 2765, 600),
        _tpu("v6e", 31.25, 918, 1600, 400),
        _gpu("H100", 81559, 989.4, 494.7, 3350, 450),
        _gpu("H200", 143771, 989.4, 494.7, 4800, 450),
        _gpu("A100-80G", 81920, 312, 156, 2039, 300),
        _gpu("A100-40G", 40960, 312, 156, 1555, 300),
        _gpu("L4", 23034, 121, 60, 300, 32),
        _gpu("RTX4090", 24564, 165.2, 82.6, 1008, 32),
    )
}

_NODE = 8
_EXAMPLES = "v5e:4x4, v5p:2x2x4, v6e:4x4, gpu:8xH100, gpu:1xA100-80G, cpu:8"


@dataclasses.dataclass(frozen=True)
class Target:
    """`topology` as it was given, its chip, and how many."""

    topology: str
    chip: Chip
    count: int


def parse_topology(topology: str) -> Target:
    """v5e:4x4, gpu:8xH100, cpu:8 and so on; raises `UserError` for what is none of these."""
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return Target(topology, Chip("cpu", "cpu", _host_bytes() / int(shape)), int(shape))
    if kind == "gpu" and (match := re.fullmatch(r"([1-9]\d*)x(.+)", shape)):
        chip = CHIPS.get(match[2])
        if chip is None or chip.platform != "gpu":
            known = ", ".join(name for name, chip in CHIPS.items() if chip.platform == "gpu")
            raise UserError(f"--topology={topology}: GPU {match[2]!r} is unknown; known are {known}")
        if int(match[1]) > _NODE:
            raise UserError(f"--topology={topology}: at most {_NODE} GPUs, one node: its network is not known")
        return Target(topology, chip, int(match[1]))
    if kind in CHIPS and CHIPS[kind].platform == "tpu" and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        return Target(topology, CHIPS[kind], math.prod(int(side) for side in shape.split("x")))
    raise UserError(f"--topology={topology}: unknown; give one such as {_EXAMPLES}")


def devices(target: Target) -> Sequence[jax.Device]:
    """Devices of a TPU or CPU target that programs can be compiled for on this machine.

    Call before JAX's first use of a device where the target is a CPU. Raises `UserError` without libtpu and for a
    shape that no slice has.
    """
    if target.chip.platform == "cpu":
        return jax.devices("cpu")[: target.count]
    from jax.experimental import topologies

    check_libtpu(target)
    try:
        described = topologies.get_topology_desc(target.topology, platform="tpu").devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"--topology={target.topology}: libtpu describes no such slice ({reason})") from error
    if len(described) != target.count:
        raise UserError(f"--topology={target.topology}: libtpu describes {len(described)} devices, not {target.count}")
    return described


def check_libtpu(target: Target) -> None:
    """Raises `UserError` when the TPU compiler is not installed; warns, once, of one that goes with another jax."""
    version = libtpu_version()
    if version is None:
        raise UserError(
            f"--topology={target.topology}: compiling for TPUs needs libtpu; pip install 'd2g_jax[tpu]', or give "
            "--method=formula"
        )
    if (unpaired := unpaired_libtpu(version)) is not None:
        warnings.warn(f"{unpaired}: what it compiles may be unreadable here; pip install 'jax[tpu]'", stacklevel=1)


def libtpu_version() -> str | None:
    """Version of the installed TPU compiler; None without one."""
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return None


def unpaired_libtpu(version: str | None) -> str | None:
    """Says so where jax's extra `tpu` asks for another libtpu than the installed `version`; None where it does not."""
    asked = next((line for line in metadata.requires("jax") or () if line.startswith("libtpu==")), None)
    if asked is None or version is None:
        return None
    wanted = asked.partition(";")[0].removeprefix("libtpu==").strip()
    if fnmatch.fnmatchcase(version, wanted):
        return None
    return f"libtpu {version} is not the one that jax {jax.__version__} goes with ({wanted})"


@contextmanager
def described_tpu() -> Iterator[None]:
    """The environment in which libtpu compiles and looks for no TPU; what the user has set stays.

    Without TPU_SKIP_MDS_QUERY it asks the metadata server of a cloud that is not there, for half a minute, and without
    the names of a host and a slice it complains that there is none. A process that has loaded libtpu keeps others on
    the host from it, unless both set ALLOW_MULTIPLE_LIBTPU_LOAD: nothing runs on a TPU here, so that is safe.
    """
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _host_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
