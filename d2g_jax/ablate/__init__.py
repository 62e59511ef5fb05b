"""`d2g ablate`: the paper's two ablations, each one command: rows as data, students by seed, figures, a table."""
