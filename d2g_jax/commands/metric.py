"""The flags of `d2g metric` and `d2g metric convert`."""

from __future__ import annotations

import json

from d2g_jax.commands import common


def run(arguments: list[str]) -> int:
    if arguments[:1] == ["convert"]:
        return _convert(arguments[1:])
    parser = common.parser("metric")
    parser.add_argument("--weights", type=common.path, required=True, help="metric folder, latent or pixel")
    parser.add_argument(
        "--a", type=common.path, required=True, help="latents (N, C, h, w) as .npy; or an image or a folder"
    )
    parser.add_argument("--b", type=common.path, required=True, help="the same form as --a")
    parser.add_argument("--draws", type=int, default=0, help="augmentations averaged; 0 (default) for none")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentations")
    parser.add_argument(
        "--preset", default="bgo", help="of the augmentations: b, g, c, o, co, bg, bgc, bgo, bgco, none"
    )
    parser.add_argument("--raw", action="store_true", help="the latents have not been through the VAE's scaling")
    own = parser.parse_args(arguments)
    common.start()
    from d2g_jax.metric.measure import measure

    measured = measure(own.weights, own.a, own.b, draws=own.draws, seed=own.seed, preset=own.preset, scaled=not own.raw)
    print(json.dumps(measured, indent=2))
    return 0


def _convert(arguments: list[str]) -> int:
    parser = common.parser("metric convert", "published PyTorch weights of a metric -> a metric folder; needs PyTorch")
    parser.add_argument("file", type=common.path, help="SPACE_latest_vgg16_tuned.pth, or torchvision's vgg16")
    parser.add_argument("--out", type=common.path, required=True, help="a new folder")
    parser.add_argument("--space", help="of a LatentLPIPS: sd15, sd21, sdxl, sd3 or flux")
    parser.add_argument("--heads", type=common.path, help="of pixel LPIPS: the lpips package's weights/v0.1/vgg.pth")
    own = parser.parse_args(arguments)
    from d2g_jax.metric.convert import convert
    from d2g_jax.runtime.interrupt import started

    started()
    print(convert(own.file, own.out, own.space, own.heads))
    return 0
