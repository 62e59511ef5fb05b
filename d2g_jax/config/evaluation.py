"""What the configurations of `d2g evaluate` share: configs/evaluate/ has one for every system of the paper's tables.

The names of files that their commands take as $COCO2014 and $COCO2017 stand in docs/evaluate.md.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def coco2014(name: str | None = None, **flags: Any) -> ConfigDict:
    """A row of the table on COCO 2014: every field is a flag of `d2g evaluate`, which overrides it."""
    return _row("coco2014-30k", name, flags)


def coco2017(name: str | None = None, **flags: Any) -> ConfigDict:
    """A row of the table on COCO 2017: every field is a flag of `d2g evaluate`, which overrides it."""
    return _row("coco2017-5k", name, flags)


def _row(protocol: str, name: str | None, flags: dict[str, Any]) -> ConfigDict:
    drawn = {"dtype": "bfloat16"} if "model" in flags else {}
    return ConfigDict({"protocol": protocol, "name": name, **drawn, **flags})
