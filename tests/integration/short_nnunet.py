"""nnUNetv2_train, but as many iterations as the environment says, at its learning rate; all else is nnU-Net's own."""

import os

from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

initialize = nnUNetTrainer.initialize


def short(self: nnUNetTrainer) -> None:
    """Shorten the training before its optimiser and schedule are made."""
    self.num_epochs, self.num_val_iterations_per_epoch = 1, 1
    self.num_iterations_per_epoch, self.initial_lr = int(os.environ["ITERATIONS"]), float(os.environ["RATE"])
    initialize(self)


nnUNetTrainer.initialize = short

if __name__ == "__main__":  # processes that are spawned import this file
    run_training_entry()
