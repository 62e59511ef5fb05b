"""Settings: every field of a run with its meaning, and config files with `--config.key=value` flags applied."""
