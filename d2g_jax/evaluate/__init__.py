"""`d2g evaluate`: numbers that say how they were measured. The job is `job.evaluate`; its file is `results`'."""
