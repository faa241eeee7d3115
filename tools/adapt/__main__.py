"""Write a bundle for any labelled data list: measure the data, decide the settings, and say why in configs/plan.md.

    python -m tools.adapt DATALIST.json OUT_BUNDLE --minutes 60
    python -m tools.adapt DATALIST.json OUT_BUNDLE --pretrained runs/pretraining --learning_rate 0.001

The bundle is btcv_ct_segmentation (CT) or feta_mri_segmentation (MRI), with the recipe of configs/field.json and what
was decided. Each decision is an id: one that is given, as `--id value`, stays as it is given.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from custom.data import read_datalist
from custom.data.datalist import SECTIONS
from custom.data.dataset import memory_bytes
from custom.errors import BadInput
from custom.files import read_json
from custom.text import did_you_mean
from tools._cli import ROOT, near, say, tool
from tools.adapt.decide import Task, decide, recipe, start_of
from tools.adapt.measure import channels_of, measure, names_of
from tools.adapt.write import write
from tools.verify import quiet


def load(options: argparse.Namespace) -> Task:
    """Read the data list and measure all of its cases.

    Raises:
        BadInput: for a list or a case that training would refuse, and see `start_of` and `names_of`.
    """
    start = start_of(options.pretrained)
    folder = options.ids.get("dataset_dir") or os.path.dirname(os.path.abspath(options.datalist))
    more = {"labelled": True, "fold": options.ids.get("fold")}
    items = {name: read_datalist(options.datalist, name, folder, **more) for name in SECTIONS}
    content = read_json(options.datalist)
    channels = options.ids.get("in_channels") or channels_of(items["training"][0])
    bar = tqdm(sum(items.values(), []), "measuring", unit="case", disable=None)
    cases = [measure(item, channels) for item in bar]
    listed = {str(entry.get("modality", "")).lower() for name in SECTIONS for entry in content[name]} - {""}
    listed = listed or {str(name).lower() for name in dict(content.get("modality") or {}).values()}
    listed = listed or {"ct" if all(case.in_hu for case in cases) else "mri"}
    if "ct" in listed and len(listed) > 1:
        raise BadInput(f"{options.datalist} has CT and {', '.join(listed - {'ct'})}; make a list of each.")
    modality = options.ids.get("modality") or sorted(listed)[0]
    count = len(items["training"])
    for purpose, part in (("train", cases[:count]), ("validate", cases[count:])):
        if not any(case.classes for case in part):
            raise BadInput(f"No label map to {purpose} on in {options.datalist} has any class; add a case that has.")
    labels = names_of(content, {id for case in cases for id in case.classes}, options.ids.get("labels"))
    bundle = ROOT / "bundles" / ("btcv_ct_segmentation" if modality == "ct" else "feta_mri_segmentation")
    return Task(bundle, start, cases[:count], cases[count:], labels, modality, channels, options)


@quiet()
def adapt(options: argparse.Namespace) -> None:
    """Measure, decide and write.

    Raises:
        BadInput: for a folder that is in use, ids that the bundles do not have, and see `load`.
    """
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{options.out} is not empty; name another folder, or remove it.")
    known = recipe(ROOT / "bundles/btcv_ct_segmentation", {})
    for id in options.ids:
        if id.partition("#")[0] not in known:
            raise BadInput(f"The bundles have no id `{id}`{did_you_mean(id, known) or '.'}")
    task = load(options)
    plan = decide(task)
    write(task, plan, out)
    say((out / "configs/plan.md").read_text())
    start = ["--pretrained", options.pretrained] if options.pretrained else []
    command = ["--config_file", f"{near(out)}/configs/train.json", "--bundle_root", near(out)]
    command += ["--datalist", options.datalist, *start, "--output_dir", f"runs/{out.name}"]
    say(f"Bundle: {options.out}\nNext:\npython -m monai.bundle run {shlex.join(command)}")


def arguments(add: Callable) -> None:
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else memory_bytes() / 2
    add("datalist", metavar="DATALIST.json", help="labelled cases to train on and to validate, of tools.datalist")
    add("out", type=Path, metavar="OUT_BUNDLE", help="folder to write; its name is the bundle's")
    add("--minutes", type=float, default=60, help="that the training may take on this machine (%(default)s)")
    add("--memory", type=float, default=memory / 2**30, metavar="GIB", help="that it may take (%(default).0f)")
    add("--pretrained", metavar="FILE", help="weights of a pre-training, or the folder of its run")


main = tool("adapt", __doc__, arguments, adapt, takes_ids=True)

if __name__ == "__main__":
    sys.exit(main())
