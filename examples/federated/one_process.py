"""Federated averaging of a bundle by MONAI's client: all sites in one process, see docs/howto/federated.md.

    python examples/federated/one_process.py BUNDLE OUT "['site_a.json', 'site_b.json']" --rounds 9 --schedule_epochs 9

Further settings are ids of the bundle's configs. In pre-training --max_iterations takes the place of --schedule_epochs.
"""

from pathlib import Path

import fire
import torch
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, WeightType
from monai.fl.utils.exchange_object import ExchangeObject


def by_name(datalists: list[str]) -> dict[str, str]:
    """Return the data lists by the names of their sites, which name their folders too."""
    sites = {Path(file).stem: str(Path(file).resolve()) for file in datalists}
    if len(sites) < len(datalists):
        raise SystemExit(
            f"error: {datalists} have files of the same name; give each site's data list a name of its own."
        )
    return sites


def site(bundle: str, out: str, datalist: str, settings: dict) -> MonaiAlgo:
    """Return a client that trains for an epoch in each round, on the cases of its own data list."""
    name = Path(datalist).stem
    values = {"datalist": datalist, "output_dir": f"{out}/{name}", "ckpt_dir": f"{out}/{name}/models", **settings}
    algo = MonaiAlgo(bundle, send_weight_diff=False, train_kwargs={**values}, eval_kwargs={**values})
    algo.initialize({ExtraItems.CLIENT_NAME: name})
    return algo


def mean(weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of the sites' weights; sites of other sizes are to be weighed by their cases."""
    means = {name: torch.stack([part[name].double() for part in weights]).mean(0) for name in weights[0]}
    return {name: value.to(weights[0][name].dtype) for name, value in means.items()}


def main(bundle: str, out: str, datalists: list[str], rounds: int, **settings) -> None:
    """Train for some rounds, print what each site measures, and save the global weights in OUT/model.pt."""
    sites = [site(str(bundle), str(out), file, settings) for file in by_name(datalists).values()]
    weights = mean([algo.get_weights().weights for algo in sites])  # the same at all sites, by their seed
    for number in range(1, rounds + 1):
        for algo in sites:
            algo.train(ExchangeObject(weights=weights, weight_type=WeightType.WEIGHTS))
        weights = mean([algo.get_weights().weights for algo in sites])
        for algo in sites:
            found = algo.evaluate(ExchangeObject(weights=weights, weight_type=WeightType.WEIGHTS)).metrics
            print(f"Round {number}, {algo.client_name}: {found}")
        torch.save(weights, f"{out}/model.pt")
    for algo in sites:
        algo.finalize()


if __name__ == "__main__":
    fire.Fire(main)
