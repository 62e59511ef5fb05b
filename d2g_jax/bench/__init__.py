"""`d2g bench NAME`: speed and memory side by side, in one process, as ratios. One module for each bench."""
