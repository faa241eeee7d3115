"""Disruptive Autoencoders: what JSON cannot say and MONAI, Ignite and torch lack.

The method, in reading order: `masking`, `disruption`, `network`, `loss`, `transfer`; `published` is the authors'
network.

What training it needs:
    data: data lists, loading and checking scans, reproducible samples, the store of prepared scans.
    engine: checkpoints, resumption, handlers, the check of a config, the record of a run.
    evaluation: metrics, pictures, the page of a run, ensembles, the probe of a pre-training.
    speed: quicker blocks, CUDA graphs, memory that is kept.

Shared by all: `errors` (what a user can mend), `files` (written whole or not at all), `text` (tables, suggestions).
"""
