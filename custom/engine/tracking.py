"""The run that MONAI's `--tracking mlflow` keeps."""

import atexit
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import Trainer
from monai.handlers import MLFlowHandler

from custom.engine.config_check import running_workflow
from custom.engine.run_record import without_tracking


class MLflow(MLFlowHandler):
    """MONAI's `MLFlowHandler`, whose run has settings, metrics and pictures, and an end.

    MONAI's own settings look for the loss in a list, where these trainers give a dictionary; they end neither an
    evaluation nor what fails, and let a run without a name go on with any other that has not ended. Here the engine
    that starts first opens the run and ends it: FINISHED, FAILED, or KILLED where the process ends before. What has not
    finished goes on when the same command is given again.

    Args:
        kwargs: see `MLFlowHandler`. A run is named by its folder, unless `run_name` says otherwise.
    """

    cur_run: Any
    opened: dict[str, "MLflow"] = {}  # the handler that ends a run, by the run's folder

    def __init__(self, **kwargs: Any) -> None:
        workflow = running_workflow()
        assert workflow is not None  # `--tracking` is an argument of one
        self.folder = Path(str(workflow.parser.get_parsed_content("output_dir"))).resolve()
        self.settings = {id: str(v) for id, v in without_tracking(workflow.parser.config).items() if _is_plain(v)}
        own = {"run_name": kwargs.get("run_name") or str(self.folder), "artifacts": None}
        loss = {"output_transform": lambda output: {"loss": float(output["loss"])}}
        super().__init__(**{**kwargs, **own, **loss})

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        if self.iteration_log:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, lambda engine: self.end("FINISHED"))
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Join the run that is open, or go on with one of the same settings that has not finished, or open one."""
        self._set_experiment()
        if str(self.folder) in self.opened:
            self.cur_run = self.opened[str(self.folder)].cur_run
            return
        name = self.run_name if isinstance(engine, Trainer) else f"{self.run_name} evaluation"
        experiment = self.experiment.experiment_id
        unfinished = [run for run in self.client.search_runs([experiment]) if run.info.status != self.run_finish_status]
        same = [run for run in unfinished if run.info.run_name == name and run.data.params == self.settings]
        if same:
            self.client.update_run(same[0].info.run_id, status="RUNNING")
        self.cur_run = same[0] if same else self.client.create_run(experiment, run_name=name)
        if not same:
            self._log_params(self.settings)
        self.opened[str(self.folder)] = self
        atexit.register(self.end, "KILLED")

    def fail(self, engine: Engine, error: Exception) -> None:
        self.end("FAILED")
        raise error

    def end(self, status: str) -> None:
        """End the run, if this handler has opened it, with the pictures, tables and records in its folder."""
        if self.opened.get(str(self.folder)) is not self:
            return
        run = self.cur_run.info.run_id
        for name in ("pictures", "evaluation"):
            if (self.folder / name).is_dir():
                self.client.log_artifacts(run, str(self.folder / name), name)
        for file in (
            part for kind in ("*.png", "report.html", "run.json", "metrics.jsonl") for part in self.folder.glob(kind)
        ):
            self.client.log_artifact(run, str(file))
        for file in self.folder.glob("config_*_*.json"):  # MONAI's copy of the config, named by the time
            self.client.log_artifact(run, str(file))
            file.unlink()
        self.client.set_terminated(run, status)
        del self.opened[str(self.folder)]
        atexit.unregister(self.end)
        self.cur_run = None
        self._dispose_sqlite_store()


def _is_plain(value: Any) -> bool:
    """Return whether a value of a config is a number, a text or a list of such, and no expression."""
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, str | int | float) and not str(part).startswith(("$", "@")) for part in parts)
