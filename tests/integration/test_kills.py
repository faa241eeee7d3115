"""Trainings that are killed, of every kind and at every kind of moment, end as ones that were not."""

import numpy as np
import pytest
import torch

from tools.studies import kills


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


def test_killed_trainings_end_as_ones_that_were_not(out, capsys):
    assert kills.main([str(out), "--pretraining", "4", "--finetuning", "0", "--torchrun", "1"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0][1:] == [*kills.MOMENTS, "weights", "state", "metrics", "TensorBoard"]
    assert cells[-2] == ["pretraining", *["1"] * 4, *["same"] * 4]
    assert cells[-1] == ["torchrun", "1", "0", "0", "0", *["same"] * 4]
    log = (out / "pretraining" / "killed.log").read_text()
    assert "SIGTERM: stopping after this iteration." in log
    assert "is saved, and the same command goes on from there." in log
    assert f"Resuming from {out}/pretraining/killed/checkpoint_iteration=" in log


def test_a_run_that_is_over_says_so(out):
    """And a difference is noticed."""
    folder = out / "pretraining" / "killed"
    whole = kills.results(folder)
    assert kills.equal(whole, kills.results(out / "pretraining" / "whole"))
    for name in whole:
        changed = kills.results(folder)
        if name == "metrics":
            changed[name] += "\n"
        elif name == "TensorBoard":
            changed[name]["loss"].pop()
        else:
            next(tensor for tensor in leaves(changed[name]) if tensor.numel())[...] += 1
        assert not kills.equal(whole, changed)


def leaves(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from leaves(value)


def test_a_run_that_ends_before_its_kill_was_not_killed(tmp_path):
    class Short:
        def start(self, folder):
            return kills.subprocess.Popen(["true"])

    for moment in kills.MOMENTS:
        assert not kills.kill(Short(), tmp_path / "run", moment, np.random.default_rng(0), start_s=5, train_s=5)
