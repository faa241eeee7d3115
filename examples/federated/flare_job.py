"""Federated averaging of a bundle by NVIDIA FLARE, in its simulator: each site in processes of its own.

    python examples/federated/flare_job.py BUNDLE OUT "['site_a.json', 'site_b.json']" --rounds 9 --schedule_epochs 9

Further settings are ids of the bundle's configs, as of one_process.py. Needs nvflare 2.9.
"""

import json
import os
import sys
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe.sim_env import SimEnv
from one_process import by_name

HERE = Path(__file__).resolve().parent


def first_weights(bundle: Path, settings: dict) -> dict[str, torch.Tensor]:
    """Return the weights that a training of the bundle starts with."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    parser.update({"bundle_root": str(bundle), **settings})
    parser.get_parsed_content("initialize")  # sets the seed
    return parser.get_parsed_content("network").state_dict()


def main(bundle: str, out: str, datalists: list[str], rounds: int, **settings) -> None:
    """Train for some rounds, and save the global weights in OUT/model.pt."""
    folder, sites = Path(out).resolve(), by_name(datalists)
    folder.mkdir(parents=True, exist_ok=True)
    task = {"bundle": str(Path(bundle).resolve()), "out": str(folder), "datalists": sites, "settings": settings}
    (folder / "task.json").write_text(json.dumps(task))
    first = {"datalist": next(iter(sites.values())), "output_dir": str(folder), **settings}
    torch.save(first_weights(Path(task["bundle"]), first), folder / "first.pt")
    places = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)  # where the sites find one_process
    recipe = FedAvgRecipe(
        min_clients=len(sites),
        num_rounds=rounds,
        train_script=str(HERE / "flare_site.py"),
        train_args=str(folder / "task.json"),
        launch_external_process=True,  # a bundle runs in the main thread of a process
        command=f"{sys.executable} -u",
        server_expected_format=ExchangeFormat.PYTORCH,
        key_metric="val_mean_dice",
        model_persistor=PTFileModelPersistor(source_ckpt_file_full_name=str(folder / "first.pt")),
    )
    run = recipe.execute(SimEnv(num_clients=0, clients=list(sites), workspace_root=str(folder / "flare")))
    found = next(Path(run.get_result()).rglob("FL_global_model.pt"))
    torch.save(torch.load(found, weights_only=True)["model"], folder / "model.pt")


if __name__ == "__main__":
    fire.Fire(main)
