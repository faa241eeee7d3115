"""Handlers of engines that a config names: stop at NaN, log of metrics, forecast, what is printed at the end."""

import itertools
import json
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch.nn.utils import get_total_norm

from custom.data.dataset import CaseDataset, memory_bytes
from custom.errors import BadInput
from custom.evaluation.metrics import not_learnt
from custom.evaluation.report import duration
from custom.files import write_text

logger = logging.getLogger(__name__)


class StopOnNaN:
    """Stop when the loss or the weights are NaN or infinite, name the cases of the batch and keep it.

    The loss is looked at before it reaches the weights, and the weights after each step: a loss that is finite can have
    gradients that are not.

    Attach it before whatever saves the weights.

    Args:
        dump_dir: folder that the batch is written to, as `nan_batch_rank=N.pt`.

    Raises:
        BadInput: from the training loop.
    """

    def __init__(self, dump_dir: str) -> None:
        self.dump_dir = Path(dump_dir)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.check_loss)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.check_weights)

    def check_loss(self, engine: Engine) -> None:
        self.check(engine, "loss", engine.state.output["loss"])

    def check_weights(self, engine: Engine) -> None:
        self.check(engine, "norm of the weights", get_total_norm(engine.network.parameters()))

    def check(self, engine: Engine, name: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            batch = engine.state.batch
            cases = ", ".join(dict.fromkeys(batch["case"]))
            dump = self.dump_dir / f"nan_batch_rank={idist.get_rank()}.pt"
            dump.parent.mkdir(parents=True, exist_ok=True)
            # Plain tensors: what MONAI adds to them is not loaded with `weights_only`.
            tensors = {key: x.as_subclass(torch.Tensor) for key, x in batch.items() if isinstance(x, torch.Tensor)}
            torch.save({"case": batch["case"], **tensors}, dump)
            raise BadInput(
                f"The {name} is {value.item()} in iteration {engine.state.iteration}, with the cases {cases}; look at "
                f"these files and at the batch in {dump}, or lower --learning_rate. The last checkpoint is untouched."
            )


class MetricsLog:
    """Write a JSON line of the run's metrics to a file at each epoch, and say them in the log.

    A resumed run replaces the lines of the epochs that it trains again.

    Args:
        path: the file, .jsonl.
        evaluator: its metrics go into the line too, of the epochs in which it has run.
        state: further values, called at each epoch, such as the learning rate.
    """

    def __init__(self, path: str, evaluator: Engine, state: Callable[[], dict[str, float]] = dict) -> None:
        self.path = Path(path)
        self.evaluator = evaluator
        self.state = state

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state = engine.state
        metrics = dict(state.metrics)
        if self.evaluator.state.epoch == state.epoch:
            metrics |= self.evaluator.state.metrics
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        lines = [line for line in lines if json.loads(line)["epoch"] < state.epoch]
        lines.append(json.dumps({"epoch": state.epoch, "iteration": state.iteration, **self.state(), **metrics}))
        write_text(self.path, "\n".join(lines) + "\n")
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info(f"Epoch {state.epoch} of {state.max_epochs}: {values}")


class Forecast:
    """Say in the log, once, after some iterations of a start, how long the training will take and what memory it has.

    The time is that of the iterations, of the median one: the first few, which set things up, and the validations
    between epochs do not count. Memory is the most so far, without the workers of the data loader.
    """

    FIRST, TIMED = 3, 10  # iterations

    def __init__(self) -> None:
        self.ends: list[float] = []  # of iterations, in seconds

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) != self.FIRST + self.TIMED:
            return
        engine.remove_event_handler(self, Events.ITERATION_COMPLETED)
        ends, state = self.ends[self.FIRST - 1 :], engine.state
        seconds = statistics.median(end - before for before, end in itertools.pairwise(ends))
        left = state.max_epochs * state.epoch_length - state.iteration
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
        memory = f"{peak / 2**30:.2g} of {memory_bytes() / 2**30:.3g} GiB"
        if torch.cuda.is_available():
            total = torch.cuda.mem_get_info()[1]
            memory += f", on the GPU {torch.cuda.max_memory_reserved() / 2**30:.2g} of {total / 2**30:.3g} GiB"
        logger.info(
            f"About {duration(left * seconds)} to go: {left} iterations of {seconds:.3g} s, and the validations. "
            f"Memory: {memory}."
        )


class TrainingSummary:
    """Print at the end of a training what it leaves, cases left out, classes not learnt, and what to do next.

    Args:
        output_dir: folder of the run.
        ckpt_dir: folder of its weights.
        dataset: of the training.
        evaluator: of a segmentation, whose last "val_mean_dice" tells which classes are not learnt.
        labels: their names, background first.
    """

    def __init__(
        self,
        output_dir: str,
        ckpt_dir: str,
        dataset: CaseDataset,
        evaluator: Engine | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        self.output_dir = output_dir
        self.ckpt_dir = ckpt_dir
        self.dataset = dataset
        self.evaluator = evaluator
        self.classes = list(labels)[1:]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        print(f"\nWeights: {self.ckpt_dir}/model.pt\nTo look at: {self.output_dir}/report.html")
        print(self.dataset.left_out(), end="")
        details = getattr(self.evaluator and self.evaluator.state, "metric_details", None) or {}
        if "val_mean_dice" in details:
            print(not_learnt(details["val_mean_dice"].cpu().numpy(), self.classes), end="")
        configs = [f"{self.output_dir}/configs/{name}.json" for name in ("train", "evaluate")]
        root = f"--bundle_root {self.output_dir}"
        print(f'Next, evaluate:  python -m monai.bundle run --config_file "{configs}" {root}')
        infer = configs[0].replace("train.json", "inference.json")
        print(f"Or, on a scan:   python -m monai.bundle run --config_file {infer} {root} --dataset_dir SCAN.nii.gz")


class EvaluationSummary:
    """Print at the end of an evaluation or inference its metrics, if it has any, and where to look.

    Args:
        what: what was written.
        output_dir: where.
    """

    def __init__(self, what: str, output_dir: str) -> None:
        self.what = what
        self.output_dir = output_dir

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        print("", *(f"{name}: {value:.4f}" for name, value in engine.state.metrics.items()), sep="\n")
        print(f"{self.what}: {self.output_dir}")
