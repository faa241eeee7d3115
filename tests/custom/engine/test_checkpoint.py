"""Weights are written whole or not at all, and a bad file is told in a sentence; see also `test_transfer`."""

import math
import os

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.engines import SupervisedEvaluator

from custom.engine.checkpoint import AtomicSaver, CheckedCheckpointLoader, WeightsSaver, read_weights
from custom.errors import BadInput


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full to write to")
def test_a_full_disk_is_told_in_a_sentence_and_leaves_what_was_saved(tmp_path):
    saver = AtomicSaver(str(tmp_path))
    saver({"a": torch.ones(3)}, "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt.part").symlink_to("/dev/full")
    with pytest.raises(BadInput, match=r"model\.pt could not be saved \(.+No space left on device"):
        saver({"a": torch.zeros(3)}, "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"The folder .+/file/run can't be made \(Not a directory\)"):
        AtomicSaver(tmp_path / "file" / "run")


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 1).state_dict(), tmp_path / "model.pt")
    with pytest.raises(BadInput, match="model.pt can't be loaded"):
        CheckedCheckpointLoader(str(tmp_path / "model.pt"), {"model": torch.nn.Linear(2, 1)})(Engine(lambda *_: None))
    with pytest.raises(BadInput, match="no checkpoint"):
        CheckedCheckpointLoader(str(tmp_path / "other.pt"), {"model": torch.nn.Linear(2, 1)})(Engine(lambda *_: None))


def test_the_best_weights_are_kept_and_the_last_where_nothing_was_validated(tmp_path):
    network = torch.nn.Linear(1, 1, bias=False)
    for folder, scores, kept in (
        ("validated", (math.nan, 0.5, 0.75, 0.25, math.nan), 0.75),
        ("not", (), 3.0),
        ("not measured", (math.nan, math.nan), 3.0),
    ):
        evaluator, trainer = SupervisedEvaluator("cpu", [], network, epoch_length=0), Engine(lambda *_: None)
        place = {"save_handler": AtomicSaver(tmp_path / folder), "filename_pattern": "model.pt", "n_saved": 1}
        best = Checkpoint({"model": network}, **place, score_function=lambda evaluator: evaluator.state.score)
        WeightsSaver(best).attach(trainer)
        WeightsSaver(best).attach(evaluator)
        for evaluator.state.score in scores:
            network.weight.data.fill_(evaluator.state.score)
            evaluator.fire_event(Events.COMPLETED)
        network.weight.data.fill_(3.0)
        trainer.run([0])
        assert os.listdir(tmp_path / folder) == ["model.pt"]
        assert read_weights(tmp_path / folder / "model.pt")["weight"].item() == kept
