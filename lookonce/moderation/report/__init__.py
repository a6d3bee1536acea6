"""One page to look at the results of a moderation run: counts, histograms, thresholds to move, images. No network."""
