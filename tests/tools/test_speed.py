import json
import statistics

import torch
from torch import nn

from custom.speed import blocks
from tests.conftest import fork_server
from tools.studies import speed

SMALLEST = "--feature_size 12 --patch_size 64 32 32 --volume 40 32 36 --volumes 2 --crops 1 --repeats 1"


def test_everything_is_measured_and_the_figures_agree(tmp_path, capsys, monkeypatch):
    fork_server()  # its processes are forked from the one that the other tests use
    if not torch.cuda.is_available():  # each step takes seconds there
        few = (speed.STOCK, "the bundle, gradient checkpointing")
        monkeypatch.setitem(speed.STEPS, "cpu", {name: speed.STEPS["cpu"][name] for name in few})
        for kind, rows in (("data", (speed.STOCK_DATA, "PersistentDataset", "store")), ("waiting", ("store",))):
            monkeypatch.setitem(speed.KINDS, kind, (speed.KINDS[kind][0], rows, speed.KINDS[kind][2]))
    assert speed.main([str(tmp_path), *SMALLEST.split()]) == 0
    assert speed.main([str(tmp_path), *SMALLEST.split(), "--only", "inference"]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    table = (tmp_path / "speed.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    processor = speed.device().type
    steps = [name for name in speed.STEPS[processor] if processor == "cuda" or "bfloat16" not in name]
    names = {"step": steps, **{kind: speed.KINDS[kind][1] for kind in ("data", "waiting")}}
    names["inference"] = speed.INFERENCE[processor]
    for kind, expected in names.items():
        rows = result[kind]
        assert [row["name"] for row in rows] == list(expected)
        for row in rows:
            assert len(row["rounds"]) == 1 + (kind == "inference")
            for figure in row["rounds"][0]:
                assert min(found[figure] for found in row["rounds"]) > 0
                assert row[figure] == statistics.median(found[figure] for found in row["rounds"])
                assert f"{row[figure]:#.3g}" in table
            assert row["times_as_fast"] == rows[0]["seconds"] / row["seconds"]
            if kind == "data":
                assert row["times_as_fast_cold"] == rows[0]["cold_seconds"] / row["cold_seconds"]
            if kind == "waiting":
                assert row["waiting_share"] < 1
            else:
                assert row["times_fewer_cpu_seconds"] == rows[0]["cpu_seconds"] / row["cpu_seconds"]
                assert 50 < row["peak_mb"] < 10_000
    assert speed.main([str(tmp_path), "--feature_size", "24"]) == 2
    assert "speed.json is of another machine or other settings" in capsys.readouterr().err


def test_each_step_is_made_of_the_parts_that_it_names():
    settings = {"feature_size": 12}
    for parts in (frozenset(), frozenset({"begin"}), frozenset({"begin", "norm"}), speed.DEFAULT):
        network = speed.make_network(parts, settings)
        norms = [
            type(module) is blocks.InstanceNorm for module in network.modules() if isinstance(module, nn.InstanceNorm3d)
        ]
        assert isinstance(network.decoder1, blocks.FoldedUpBlock) is ("folding" in parts)
        assert len(norms) > 20 and set(norms) == {"norm" in parts}
