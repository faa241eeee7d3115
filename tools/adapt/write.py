"""The bundle that is written: configs, plan, metadata, documentation."""

import shutil
from pathlib import Path

import numpy as np

from custom.engine.run_bundle import apply, copy_bundle
from custom.files import read_json, write_json, write_text
from custom.text import markdown_table
from tools._cli import ROOT
from tools.adapt.decide import Plan, Task, middle, recipe

README = """# {name}

A {network} that segments {classes} in {modality}. It was adapted to its data by `tools.adapt` of DAE Bundles;
[the plan](../configs/plan.md) says what was measured and decided. Where the bundle has weights, in `models/`,
`docs/training.json` says how they were trained. Research only, not for clinical use.

| id | class |
|---|---|
{rows}

## Commands

In the bundle's folder. Train, evaluate, and segment a scan or a folder of scans:

    python -m monai.bundle run --config_file configs/train.json --datalist LIST.json --output_dir runs/a
    python -m monai.bundle run --config_file "['runs/a/configs/train.json','runs/a/configs/evaluate.json']" \\
        --bundle_root runs/a
    python -m monai.bundle run --config_file runs/a/configs/inference.json --bundle_root runs/a \\
        --dataset_dir scan.nii.gz

## License

The bundle: Apache-2.0. The data has its own: `docs/data_license.txt`.
"""


def write(task: Task, plan: Plan, out: Path) -> None:
    """Write the bundle: configs, plan, metadata, documentation and licence."""
    copy_bundle(task.bundle, out, ROOT / "custom")
    shutil.rmtree(out / "docs")
    for name in (
        "datalist.json",
        *(f"configs/{preset}.json" for preset in ("few_labels", "field", "published", "resenc")),
    ):
        (out / name).unlink(missing_ok=True)
    train, whole = out / "configs/train.json", read_json(out / "configs/train.json")
    known = recipe(task.bundle, task.start)
    write_json(train, {id: known[id] for id in [*whole, *known] if id in known})
    apply({"network_def": known["network_def"], **plan.ids}, out, plan.ensemble)
    file = out / "configs/metadata.json"
    metadata = read_json(file)
    classes = ", ".join(task.labels[1:])
    network = "residual-encoder U-Net" if "n_blocks_per_stage" in task.start else "Swin UNETR"
    metadata |= {
        "name": out.name,
        "task": f"Segmentation of {classes} in {task.modality.upper()}",
        "description": f"A {network} that segments {classes} in {task.modality.upper()}",
        "data_source": "see docs/data_license.txt",
        "image_classes": f"{task.channels} channel(s) of {task.modality.upper()}",
        "references": metadata["references"][1:],
    }
    write_json(file, metadata)
    rows = "\n".join(f"| {id} | {name} |" for id, name in enumerate(task.labels))
    words = {"name": out.name, "network": network, "classes": classes, "modality": task.modality.upper(), "rows": rows}
    write_text(out / "docs/README.md", README.format(**words))
    data = "The data is not part of this bundle. Name its source and licence here.\n"
    write_text(out / "docs/data_license.txt", data)
    write_text(out / "configs/plan.md", plan_text(task, plan, out.name))


def plan_text(task: Task, plan: Plan, name: str) -> str:
    """Return the plan: what was measured, decided and noted."""
    total, component = task.sizes_mm3(np.sum), task.sizes_mm3(middle)
    rows = [["id", "class", "cases", "ml", "components", "ml of a component", "values"]]
    for id, values in task.values().items():
        counts = [len(case.classes[id].components) for case in task.cases if id in case.classes]
        sizes = [f"{total[id] / 1e3:.3g}", f"{np.median(counts):.0f}", f"{component[id] / 1e3:.3g}"]
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
        rows.append([str(id), task.labels[id], str(len(counts)), *sizes, f"{low:.4g}, {median:.4g}, {high:.4g}"])
    lines = "\n".join(plan.lines)
    notes = "".join(f"- {note}\n" for note in plan.notes) or "- Nothing.\n"
    return f"""# Plan of {name}

Measured on {len(task.cases)} cases to train on; {len(task.held_out)} more validate. The numbers are medians of the
cases. The component is the one that a class's middle voxel is in. The values are the 10th, 50th and 90th percentile of
the labelled voxels.

{markdown_table(rows)}

## Decisions

Each is an id of `train.json`. Change it there, or on the command line: `--learning_rate 0.001`.

{lines}

## Look at

{notes}"""
