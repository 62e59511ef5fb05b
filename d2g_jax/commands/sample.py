"""The flags of `d2g sample`."""

from __future__ import annotations

import json

from d2g_jax.commands import common
from d2g_jax.inputs.text import as_prompt, lines, read_text
from d2g_jax.runtime.errors import UserError


def run(arguments: list[str]) -> int:
    parser = common.parser("sample")
    common.add_model_flags(parser)
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=common.path, help="file of prompts: text, one a line, or columns")
    common.add_prompts_column(parser)
    parser.add_argument(
        "--layout", choices=("flat", "geneval"), default="flat", help="geneval: the tree its evaluator reads (.jsonl)"
    )
    parser.add_argument("--images", type=int, default=1, help="images per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latents", type=common.path, help="float32 noise (N, C, h, w), .npy, in place of --seed")
    parser.add_argument("--tiled", action="store_true", help="decode large images in overlapping tiles")
    parser.add_argument("--batch", type=int, default=64, help="images per call, all devices together")
    parser.add_argument("--out", type=common.path, required=True)
    teacher = parser.add_argument_group("for a teacher; a one-step student has none of these")
    common.add_solution_flags(teacher)
    own = parser.parse_args(arguments)
    common.start()
    from d2g_jax.pairs import read_prompts
    from d2g_jax.sample.job import Request, sample

    as_tree = own.layout == "geneval"
    if as_tree and (own.prompts is None or own.prompts.suffix.lower() != ".jsonl" or own.prompt):
        raise UserError("--layout=geneval: give --prompts=evaluation_metadata.jsonl, and no --prompt")
    column = own.prompts_column or ("prompt" if as_tree else "")
    listed = own.prompts and read_prompts(own.prompts, column=column, asked="--prompts-column").lines
    metadata = tuple(lines(read_text(own.prompts, "give GenEval's file"))) if as_tree else ()  # each has a prompt
    prompts = (*(as_prompt(prompt, "--prompt") for prompt in own.prompt), *(listed or ()))
    request = Request(common.asked(own, own.batch), prompts, own.images, own.latents, metadata)
    seconds = sample(request, own.out)
    print(json.dumps({"out": str(own.out), "seconds": {name: round(value, 3) for name, value in seconds.items()}}))
    return 0
