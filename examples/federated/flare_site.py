"""A site of flare_job.py: MONAI's client trains the bundle on the site's cases in each round."""

import json
import sys
from pathlib import Path

import nvflare.client as flare
from monai.fl.utils.constants import WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from one_process import site


def main() -> None:
    flare.init()
    task = json.loads(Path(sys.argv[1]).read_text())
    algo = site(task["bundle"], task["out"], task["datalists"][flare.get_site_name()], task["settings"])
    while flare.is_running():
        weights = ExchangeObject(weights=flare.receive().params, weight_type=WeightType.WEIGHTS)
        measured = algo.evaluate(weights).metrics
        algo.train(weights)
        flare.send(flare.FLModel(params=algo.get_weights().weights, metrics=measured))
    algo.finalize()


if __name__ == "__main__":
    main()
