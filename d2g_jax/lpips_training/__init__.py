"""`d2g lpips`: a LatentLPIPS for any autoencoder, by the paper's recipe.

A VGG with batch norm learns to classify latents (`classify`), then the heads of its taps are calibrated on human
two-alternative forced choices (`calibrate`). `job.train_lpips` is the whole job; the digits' metric is made by the same
functions.
"""
