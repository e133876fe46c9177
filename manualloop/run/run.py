"""A run of ``train_loop``: when it evaluates, saves, resumes and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from time import perf_counter
from typing import Any

from manualloop.checkpoint.changes import forget_functions
from manualloop.checkpoint.contract import Contract
from manualloop.checkpoint.finite import require_finite
from manualloop.errors import CheckpointError, ConfigError
from manualloop.models import remember_modes, unwrap_model
from manualloop.notices import say
from manualloop.optimizers.prepare import require_initialized
from manualloop.reading.describe import is_prepared
from manualloop.reading.streams import cannot_rewind
from manualloop.run.delivery import Delivery, describe_settings
from manualloop.run.evaluating import BeforeEvaluation, Scored, watching
from manualloop.run.evaluations import Evaluations, read_metrics
from manualloop.run.folder import RunFolder
from manualloop.run.report import Report
from manualloop.run.stopping import EvaluationStopped, Stopping
from manualloop.state import TrainState, has_updates_left
from manualloop.strategy.base import Strategy, on_main
from manualloop.types import Tracker


class Run:
    """The evaluations and checkpoints of a run, beside its state.

    Attributes:
        evaluations: The last and the best evaluation.
        stopped_by: Name of what ended the run early, or None.
    """

    def __init__(
        self,
        state: TrainState,
        report: Report,
        folder: RunFolder | None,
        stopping: Stopping,
        evaluate: Callable[[], Mapping[str, Any]] | None,
        best_metric: str | None,
        patience: int | None,
        strategy: Strategy,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.evaluations = Evaluations(best_metric)
        self.stopped_by: str | None = None
        self._state, self._report, self._folder = state, report, folder
        self._stopping, self._evaluate = stopping, evaluate
        self._patience = patience
        self._strategy = strategy
        self._evaluated_step = 0
        self._is_pending = False  # an evaluation that was due and was not made
        self._broken_off: BeforeEvaluation | None = None
        self._saved: object = None
        self._scored = Scored()
        self._told: set[str] = set()
        self._delivery = Delivery(
            trackers if strategy.is_main else (), folder.directory if folder else None
        )
        self._num_known = 0  # records that a checkpoint knows
        self._has_ended = False
        self._loader: Iterable[Any] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation; empty before the first."""
        return self.evaluations.last

    @property
    def best_metrics(self) -> dict[str, float]:
        """Metrics of the best evaluation; empty without a ``best_metric``."""
        return self.evaluations.best if self.evaluations.best_metric is not None else {}

    @property
    def best_step(self) -> int | None:
        """Number of updates before the best evaluation; None without a ``best_metric``."""
        return self.evaluations.best_step if self.evaluations.best_metric is not None else None

    @property
    def is_best(self) -> bool:
        """Whether the weights as they are were evaluated, and are the best so far."""
        evaluations = self.evaluations
        if evaluations.best_metric is None or not evaluations.number:
            return False
        is_evaluated = self._evaluated_step == self._state.progress.num_steps
        return is_evaluated and evaluations.num_since_best == 0

    def resume(
        self,
        loader: Iterable[Any],
        on_step: Callable[..., object] | None,
        contract: Contract,
    ) -> None:
        """Resume from the folder's checkpoint, if there is one, and show the progress bar.

        Args:
            loader: The loader that is trained on.
            on_step: As in ``train_loop``; it may hold random generators, as ``evaluate`` may.
            contract: The contract of the run, which the checkpoint must be of.
        """
        self._loader = loader
        require_initialized(self._state.model)
        self.evaluations.tell_direction()
        if self._folder is not None:
            self._resume_from(self._folder, loader, contract)
        self._state.holders |= {"evaluate": self._evaluate, "on_step": on_step}
        self._report.open()

    def _resume_from(self, folder: RunFolder, loader: Iterable[Any], contract: Contract) -> None:
        if reason := cannot_rewind(loader):
            say(f"{reason}: resuming inside an epoch is not bit-exact.")
        notes, records = folder.resume(contract)
        if notes:
            self.evaluations.restore(notes["evaluations"], records)
            self._evaluated_step, self._is_pending = notes["evaluated_step"], notes["is_pending"]
            self._report.restore(notes["report"], records, self._state.progress.num_steps)
            self._saved, self._num_known = self._fingerprint(), len(records)
        if has_updates_left(self._state.progress, self._report.plan):
            folder.check_space()

    def open_trackers(self, contract: Contract, arguments: Mapping[str, Any]) -> None:
        """Open the trackers of the run, on rank 0. Collective.

        Args:
            contract: The contract of the run.
            arguments: All arguments of ``train_loop``.

        Raises:
            ConfigError: One of them cannot be opened.
        """
        plan = self._report.plan
        goes_further = (
            has_updates_left(self._state.progress, plan) and not self._is_out_of_patience()
        )
        is_finished = not (goes_further or self._is_pending)

        def open_all() -> None:
            if arguments["trackers"]:
                settings = describe_settings(self._state, plan, contract, arguments)
                records = self._report.history.records
                self._delivery.open(records, settings, is_finished=is_finished)

        on_main(self._strategy, open_all)  # also without trackers: another rank may have some

    def track(self) -> None:
        """Send the records that are due to the trackers."""
        history = self._report.history
        self._delivery.deliver(history.records, history.num_complete, self._num_known)

    def catch_up(self) -> None:
        """Make the evaluation that the previous process had no time for."""
        if self._is_pending:
            self.evaluate()
            self.save()
        self.stopped_by = self.reason_to_stop()

    def evaluate(self) -> None:
        """Evaluate, unless a signal leaves no time for it; then the next process evaluates."""
        if self._evaluate is None or self._evaluated_step == self._state.progress.num_steps > 0:
            return  # updates that were skipped leave the weights as they were evaluated
        self._is_pending = True
        before, is_stopped = BeforeEvaluation(self._state.all_holders()), False
        begin = perf_counter()
        self._scored, put_modes_back = Scored(), remember_modes(self._state.model)
        inner = unwrap_model(self._state.model)
        was_training = inner.training
        try:
            with (
                self._report.waiting_for("evaluating"),
                watching(self._state, **self._state.holders) as self._scored,
                self._stopping.evaluating(),
            ):
                returned = self._evaluate()
            self._state.times.evaluation += perf_counter() - begin
        except EvaluationStopped:
            is_stopped = True  # restored below: the traceback may hold a loader and its threads
        except Exception:
            before.restore()
            if not self._may_save_after_error() or self._strategy.world_size > 1:
                raise  # a save takes all ranks, and the others may be anywhere
            if self._stopping.reason() in (None, "max_time"):
                self.save()  # so that no update is lost; the next process evaluates first
                before.report_draws()
                raise
            is_stopped = True  # the signal has reached a worker of the loader first
        if is_stopped:
            before.restore()  # the signal may have come while evaluate_loop did that
            self._may_save_after_error()
            self._broken_off = before
            return
        if was_training and not inner.training:
            put_modes_back()  # the next update would thaw layers that were set to eval
        self._scored.read(returned, self._state.model)
        self._tell_scored()
        metrics = self._agree_on(returned)
        self._is_pending, self._evaluated_step = False, self._state.progress.num_steps
        self._report.add_evaluation(self._evaluated_step, metrics)
        try:
            self.evaluations.add(metrics, self._evaluated_step)
        except ConfigError:
            self.save()  # with the metrics, by which it is found once the name is right
            raise
        if self._is_out_of_patience():
            self._report.end_interval()

    def _tell_scored(self) -> None:
        """Log once what a checkpoint does not have of the weights that were scored."""
        scored, lines = self._scored, []
        if scored.has_left_others:
            lines.append("evaluate has changed the weights: the training continues with those.")
        if scored.problem is not None:
            lines.append(f"{scored.problem}: model.safetensors has the trained weights.")
        if scored.unsaved is not None:
            lines.append(
                f"{scored.unsaved} is scored and not saved, so a resumed run begins with another: "
                'pass it as extras={"average": average}.'
            )
        for line in lines:
            if line not in self._told:
                say(line)
        self._told.update(lines)

    def _may_save_after_error(self) -> bool:
        """Tell whether the weights are those that are trained, after an evaluation was ended."""
        if not self._scored.has_left_others:
            return True
        say(
            "evaluate ended while it had other weights in the model, such as an average, so "
            f"nothing was saved after step {self._state.progress.num_steps}. Let it put the "
            "trained ones back in a finally: block."
        )
        self._saved = self._fingerprint()
        return False

    def _agree_on(self, returned: Any) -> dict[str, Any]:
        """Return the metrics of rank 0, by which all ranks decide.

        Raises:
            ConfigError: They are none. The update was saved.
        """
        metrics: dict[str, Any] = {}
        problem = None
        try:
            metrics = read_metrics(returned)
        except ConfigError as error:
            problem = str(error)
        metrics, problem = self._strategy.gather((metrics, problem))[0]
        if problem is not None:
            self.save()  # the next process evaluates first
            raise ConfigError(problem)
        return metrics

    def reason_to_stop(self) -> str | None:
        """Return the reason to end the run after this step, or None."""
        return "patience" if self._is_out_of_patience() else self._stopping.reason()

    def save(self) -> None:
        """Save the run, if it has a folder and has changed since it was last saved."""
        if self._folder is None or self._saved == self._fingerprint():
            return
        with self._report.waiting_for("saving"):
            self._save(self._folder)

    def _save(self, folder: RunFolder) -> None:
        notes = self._notes() | {"report": self._report.notes()}
        is_evaluated = self._evaluated_step == self._state.progress.num_steps
        metrics = self.metrics if is_evaluated else {}
        scored = self._scored.weights if is_evaluated else None
        begin = perf_counter()
        folder.save(notes, self._report.history.records, metrics, scored)
        self._state.times.checkpoint += perf_counter() - begin
        self._saved, self._num_known = self._fingerprint(), len(self._report.history.records)
        self.track()

    def _notes(self) -> dict[str, Any]:
        return {
            "evaluations": self.evaluations.notes(),
            "evaluated_step": self._evaluated_step,
            "is_pending": self._is_pending,
        }

    @property
    def place(self) -> str:
        """Where the run has ended, and where the same command resumes it, in words."""
        place = f"ended after step {self._state.progress.num_steps}"
        if self._folder is None:
            return f"{place}."
        return f"{place}. The same command resumes there, from {self._folder.directory}."

    def finish(self) -> None:
        """Evaluate and save at the end of the run, unless the last step did."""
        num_steps = self._state.progress.num_steps
        if self.stopped_by not in (None, "patience") and self._folder is not None:
            if self._broken_off is not None:
                self._broken_off.report_draws()
            say(f"{self.stopped_by}: {self.place}")
            return
        self._report.end_interval()
        if self._folder is None:  # else they were looked at before they were saved
            require_finite(self._state, self._strategy)
        if self._evaluate is not None and self._evaluated_step != num_steps:
            self.evaluate()
        self.save()
        self._has_ended = True
        self._advise()

    def _advise(self) -> None:
        """Log what took more time than it should, if the run was long enough to tell."""
        loader: Any = self._loader
        may_group = is_prepared(loader) and loader.batch_sampler.lengths is None
        num_workers = getattr(loader, "num_workers", None)
        advice = self._state.times.advice(num_workers, may_group=may_group)
        if advice is not None:
            say(advice)

    def rehearse(self) -> None:
        """Take the run apart as a save does, so that what cannot be saved is refused now."""
        if self._folder is not None:
            self._folder.rehearse(self._notes())

    def find_checkpoints(self) -> tuple[Path | None, Path | None]:
        """Return the folders of the best and of the newest checkpoint."""
        if self._folder is None:
            return None, None
        best, last = self._folder.find_checkpoints()
        return best if self.evaluations.best_metric is not None else None, last

    def close(self) -> None:
        """Close the bar and the trackers, and write the records since the last checkpoint."""
        try:
            self._close()
        finally:
            history = self._report.history
            self._delivery.close(
                history.records,
                history.num_complete,
                self._num_known,
                is_finished=self._has_ended,
            )

    def _close(self) -> None:
        self._report.close()
        if self._state.reader is not None:
            self._state.reader.close()
        for name in ("evaluate", "on_step"):  # of this run; they may hold its result in a cycle
            self._state.holders.pop(name, None)
        forget_functions(self._state)
        if self._folder is not None and self._strategy.is_main:
            with suppress(CheckpointError):  # another error may be on its way
                self._folder.write_records(self._report.history.records)
                self._folder.write_times()

    def _is_out_of_patience(self) -> bool:
        return self._patience is not None and self.evaluations.num_since_best >= self._patience

    def _fingerprint(self) -> object:
        return astuple(self._state.progress), self.evaluations.number, self._is_pending
