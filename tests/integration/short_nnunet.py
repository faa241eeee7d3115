"""nnUNetv2_train, but one iteration at a learning rate of 0, and no prediction of its own cases at the end."""

from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

initialize = nnUNetTrainer.initialize


def short(self: nnUNetTrainer) -> None:
    """Shorten the training before its optimiser and schedule are made."""
    self.num_epochs = self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1
    self.initial_lr = 0
    initialize(self)


nnUNetTrainer.initialize = short
nnUNetTrainer.perform_actual_validation = lambda self, *args, **kwargs: None

if __name__ == "__main__":  # processes that are spawned import this file
    run_training_entry()
