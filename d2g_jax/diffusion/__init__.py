"""What diffusion models are made of: noise, schedules, solvers, and the one-step systems of other methods.

Pure functions of arrays: no network's parameters, no file and no mesh is known here.
"""
