"""Looking at what a network does: metrics, pictures, ensembles and test-time augmentation."""
