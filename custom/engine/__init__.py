"""Between the bundles' configs and MONAI's Ignite engines.

config_check: the first step of each run.
handlers: progress, metrics, summaries, a stop at NaN.
checkpoint: every way in which weights are written and read.
resume: a killed run goes on as if it had not been killed.
process: what a run changes in its process, and takes back.
run_record: what a training was started with.
worker: how worker processes take signals.
"""
