"""Two sites, one process: federated averaging of a bundle by MONAI's client, in a few lines.

Run it as `python examples/federated.py BUNDLE OUT SITE_A.json SITE_B.json`; see docs/howto/federated.md.
"""

import sys
from pathlib import Path

import torch
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, WeightType
from monai.fl.utils.exchange_object import ExchangeObject


def site(bundle: Path, out: Path, name: str, datalist: str, rounds: int, settings: dict) -> MonaiAlgo:
    """Return a client that trains an epoch in each round and measures the global weights on its own cases."""
    values = {"datalist": datalist, "output_dir": str(out / name), "ckpt_dir": str(out / name / "models"), **settings}
    algo = MonaiAlgo(
        str(bundle),
        local_epochs=1,
        send_weight_diff=False,
        train_kwargs={"schedule_epochs": rounds, **values},
        eval_kwargs={**values},
    )
    algo.initialize({ExtraItems.CLIENT_NAME: name})
    return algo


def mean(weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of the sites' weights; weigh them by cases where sites differ in size."""
    return {name: torch.stack([part[name].float() for part in weights]).mean(0) for name in weights[0]}


def main(bundle: Path, out: Path, datalists: list[str], rounds: int = 2, **settings) -> dict[str, torch.Tensor]:
    """Train for some rounds and return the global weights, which are also saved in `OUT/model.pt`."""
    sites = [site(bundle, out, Path(file).stem, file, rounds, settings) for file in datalists]
    weights = mean([algo.get_weights().weights for algo in sites])  # all sites draw the same from the same seed
    for number in range(rounds):
        for algo in sites:
            algo.train(ExchangeObject(weights=weights, weight_type=WeightType.WEIGHTS))
        weights = mean([algo.get_weights().weights for algo in sites])
        for algo in sites:
            result = algo.evaluate(ExchangeObject(weights=weights, weight_type=WeightType.WEIGHTS))
            print(f"Round {number + 1}, {algo.client_name}: {result.metrics}")
    for algo in sites:
        algo.finalize()
    torch.save(weights, out / "model.pt")
    return weights


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
