"""What a student is trained by: squared error and perceptual metrics, their augmentations, the adversary's losses.

Nothing here knows of train states, optimisers or records.
"""
