"""`d2g demo`: the whole job on the embedded world, measured on noise that no student has seen."""
