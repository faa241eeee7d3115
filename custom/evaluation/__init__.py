"""Looking at what a network does: metrics, pictures, the page of a run, ensembles, and the probe of a pre-training."""
