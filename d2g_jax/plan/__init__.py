"""`d2g plan`: what a config takes on a target, before the first step and without the target.

architectures (teachers as shapes) and targets (chips and slices) -> shapes (a run on a mesh) -> programs (compiled) or
formula (counted from the trace) -> plan (the figures) -> planner (what fits) -> report.
"""
