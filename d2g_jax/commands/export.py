"""The flags of `d2g export`."""

from __future__ import annotations

from d2g_jax.commands import common
from d2g_jax.runtime.errors import UserError


def run(arguments: list[str]) -> int:
    parser = common.parser("export")
    models = "training workdir; or a pipeline folder or .safetensors file, to convert it"
    parser.add_argument("--model", required=True, help=models)
    common.add_part_flags(parser)
    parser.add_argument("--to", choices=["diffusers", "single", "flax", "lora", "stablehlo"], required=True)
    parser.add_argument("--only", choices=["unet"], help="of --to=single: the UNet alone, for ComfyUI's UNETLoader")
    parser.add_argument("--out", type=common.path, required=True, help="a new folder; for stablehlo a new file")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--height", type=int, help="of a StableHLO file's images; default is the model's own")
    parser.add_argument("--width", type=int, help="of a StableHLO file's images; default is the model's own")
    parser.add_argument("--rank", type=int, help="of a LoRA; a student that was trained as one has its own")
    own = parser.parse_args(arguments)
    if own.to == "lora" and own.lora:
        raise UserError("--to=lora writes the student's own difference from its teacher; leave out --lora")
    common.start()
    from d2g_jax.export import export_student
    from d2g_jax.runtime import mesh
    from d2g_jax.sample.sampler import Sampler

    sampler = Sampler.load(own.model, mesh.make_mesh(), parts=common.parts(own))
    settings = {"dtype": own.dtype, "size": (own.height, own.width), "only": own.only, "rank": own.rank}
    print(export_student(sampler, own.to, own.out, **settings))
    return 0
