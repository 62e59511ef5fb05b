"""The pair job: prompts -> the teacher's ODE solutions -> TFRecord shards.

Record i is a pure function of (config, i): its prompt is prompt i // pairs_per_prompt of the source (read again from
the top when it is exhausted), its noise is drawn from (seed, i). A shard is the unit of work; a rerun makes only the
shards that are missing, and any number of processes share the list of shards.

    prompts.py    text, JSON-lines, parquet and TFDS sources
    batches.py    prompts and noise of a shard, ready for the devices; batches solved one ahead of the reader
    job.py        the manifest, and the job itself
    claims.py     which worker makes which shard, where workers come and go
    resolve.py    records solved again and compared
    estimate.py   what a job would cost
"""

from d2g_jax.pairs.job import FOLDER, make_manifest, make_pairs, solution
from d2g_jax.pairs.prompts import Prompts, read_prompts

__all__ = ["FOLDER", "Prompts", "make_manifest", "make_pairs", "read_prompts", "solution"]
