import json
import statistics

from tools import speed

SMALLEST = "--feature_size 12 --patch_size 64 32 32 --volume 64 --volumes 2 --crops 2 --repeats 2"


def test_everything_is_measured_and_the_figures_agree(tmp_path, capsys):
    speed.main([str(tmp_path), *SMALLEST.split()])
    result = json.loads((tmp_path / "speed.json").read_text())
    table = (tmp_path / "speed.md").read_text()
    assert table == capsys.readouterr().out
    steps = [name for name, parts in speed.STEPS.items() if "bfloat16" not in parts]
    for key, names in {"step": steps, "data": speed.DATA, "inference": speed.INFERENCE}.items():
        rows = result[key]
        assert [row["name"] for row in rows] == list(names)
        for row in rows:
            for figure in ("seconds", "cpu_seconds", "peak_mb"):
                assert len(row["rounds"]) == 2 and min(found[figure] for found in row["rounds"]) > 0
                assert row[figure] == statistics.median(found[figure] for found in row["rounds"])
            assert row["ratio"] == rows[0]["seconds"] / row["seconds"]
            assert row["cpu_ratio"] == rows[0]["cpu_seconds"] / row["cpu_seconds"]
            assert 50 < row["peak_mb"] < 10_000
            assert f"| {row['name']} | {row['seconds']:.3g} | {row['ratio']:.2f} |" in table
    waiting = result["waiting"]
    assert waiting["iterations"] == 4 and 0 < waiting["waiting_share"] < 1
    assert waiting["step_crops_per_second"] == 1 / waiting["step_seconds"]


def test_each_step_is_made_of_the_parts_that_it_names():
    settings = {"feature_size": 12, "patch_size": [64, 32, 32]}
    for parts in (frozenset(), frozenset({"begin"}), frozenset({"begin", "norm"}), speed.DEFAULT):
        network = speed.make_network(parts, settings)
        folded = isinstance(network.decoder1, speed.FoldedUpBlock)
        norms = [type(module) is speed.InstanceNorm for module in network.modules() if hasattr(module, "num_features")]
        assert folded is ("folding" in parts)
        assert len(norms) > 20 and set(norms) == {"norm" in parts}
