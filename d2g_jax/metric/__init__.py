"""Jobs about a perceptual metric: distances between files, published weights read, figure 5 of the paper."""
