"""`d2g teacher`: the embedded world's autoencoder, denoiser, metrics and judge, trained from nothing."""
