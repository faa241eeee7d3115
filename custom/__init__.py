"""What JSON cannot say: the few classes of Disruptive Autoencoders that MONAI, Ignite and torch lack.

Read in this order: `masking`, `disruption`, `network` and `loss` are the method; `data` reads and checks scans;
`handlers`, `pictures`, `provenance`, `workflow` and `errors` are the glue between the bundles' configs and MONAI's
Ignite engines.
"""
