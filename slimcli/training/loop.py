"""A whole training: the stages of a recipe in order, stoppable and resumable at any step, and the summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimcli import data as datasets
from slimcli.device import environment, find_dtype
from slimcli.files import write_file, write_json
from slimcli.measure.evaluation import evaluate
from slimcli.memory import freed_memory_kept
from slimcli.progress import Progress
from slimcli.recipe import Recipe
from slimcli.store.model_folder import load_weights, read_config
from slimcli.store.run_folder import CHECKPOINT, ENVIRONMENT, LAST, RECIPE, SUMMARY, WEIGHTS, point_latest
from slimcli.training.checkpoint import adopt_slimming
from slimcli.training.control import Control, Work, stop_signals
from slimcli.training.plan import stages_of
from slimcli.training.run import Run, open_run
from slimcli.training.session import Log, Session, life_head_taught, model_config, set_up
from slimcli.training.stages import Stage
from slimcli.training.track import Tracker
from slimcli.training.validation import scores_text, validate


def run_recipe(
    recipe: Recipe,
    device_name: str,
    resume: Path | None,
    progress: Progress,
    log: Log,
    step_schedule: Callable[[Any, Any, int], float],
) -> tuple[Path, dict[str, Any]]:
    """Run a recipe's stages; return the run folder and its summary. See `slimcli.train.train`."""
    session = set_up(recipe, device_name, progress, log, resume)
    run = open_run(recipe, model_config(session), resume, session.accelerator)
    stages = stages_of(session)
    measuring = len(session.check_on)
    work = Work(progress, sum(stage.work for stage in stages) + 4 * measuring)
    state = run.restore() if resume else None
    start_progress = work.part(measuring)
    if state is None:
        begin(session, run, start_progress, log)
    else:
        adopt_slimming(session.model, state.get("slimming", {}))
        session.model.load_state_dict(state["model"])
        log(f"going on with {run.folder} from {run.position.words(len(stages))}")
        run.tracker = Tracker(session.accelerator, recipe, run.folder, log)
    try:
        with stop_signals(log) as stop, freed_memory_kept():
            run_stages(stages, run, state, Control(log, work, stop, step_schedule))
    finally:
        assert run.tracker is not None
        run.tracker.finish()
    summary = summarise(session, run, work.part(3 * measuring), log)
    return run.folder, summary


def begin(session: Session, run: Run, progress: Progress, log: Log) -> None:
    """Write what a new run starts with, and validate the dense model."""
    if run.writes:
        warning = point_latest(run.folder)
        if warning is not None:
            log(f"warning: {warning}")
        write_file(run.folder / RECIPE, session.recipe.to_toml().encode())
        write_json(run.folder / ENVIRONMENT, environment(session.device))
    run.tracker = Tracker(session.accelerator, session.recipe, run.folder, log)
    if session.model.segments and not session.target.has_classifier:
        # class maps of an untaught head say nothing, and a pass over them takes minutes
        run.add({"event": "start"}, 0)
        return
    found = validate(session, session.model, "none", progress)
    run.add({"event": "start", **found.row()}, 0)
    log(f"dense model as given: {scores_text(found.row())} on {found.count} images")


def run_stages(stages: list[Stage], run: Run, state: dict[str, Any] | None, control: Control) -> None:
    """The stages from the run's position on; `state` is the checkpoint of a run that goes on."""
    for stage in stages:
        if stage.number < run.position.stage:
            control.work.part(stage.work)
            continue
        stage.run(run, state, control)
        state = None


def summarise(session: Session, run: Run, progress: Progress, log: Log) -> dict[str, Any]:
    """Measure the best model dense against slim on the main process, and write the summary that ends a run."""
    summary: dict[str, Any] = {}
    accelerator, recipe, model = session.accelerator, session.recipe, session.model
    if accelerator.is_main_process:
        # the best epoch may be of a stage before one that changed how patches leave
        adopt_slimming(model, read_config(run.folder)["slimming"])
        load_weights(model, run.folder / WEIGHTS)
        device, batch_size = accelerator.device, recipe.data.batch_size
        dtype = find_dtype(recipe.precision, device)
        # this process measures alone what all of them validated on
        val = session.val_set.unsplit() if isinstance(session.val_set, datasets.StreamedImages) else session.val_set
        loader = datasets.eval_loader(val, session.prepare, batch_size, session.workers, device)
        trained = any(stage.mode != "none" for stage in recipe.stages)
        rows = evaluate(model, loader, None if trained else [], device, dtype, progress)
        start = next(row for row in run.rows if row["event"] == "start")
        facts = environment(device)
        best = None if run.best_epoch is None else dict(zip(("stage", "epoch"), run.best_epoch, strict=True))
        summary = {
            "run": str(run.folder),
            "model": recipe.model.name,
            "device": facts["device"],
            "threads": facts["threads"],
            "precision": recipe.precision,
            "batch_size": batch_size,
            "versions": facts["versions"],
            "before": {key: start[key] for key in ("top1", "top5", "loss", "miou", "similarity") if key in start},
            "best_epoch": best,
            "life_head_taught": life_head_taught(session),
            "rows": rows,
        }
        if best is not None:
            log(best_epoch_line(run, best))
        write_json(run.folder / SUMMARY, summary)
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return summary


def best_epoch_line(run: Run, best: dict[str, int]) -> str:
    """Which stage and epoch the saved model is from, and how the last one compares."""
    epochs = [row for row in run.rows if row["event"] == "epoch"]
    row = next(row for row in epochs if (row["stage"], row["epoch"]) == (best["stage"], best["epoch"]))
    values = {key: row.get(f"val_{key}") for key in ("top1", "miou", "similarity")}
    line = f"best epoch: stage {best['stage']} epoch {best['epoch']} ({scores_text(values)})"
    if row is epochs[-1]:
        return line
    last = {key: epochs[-1].get(f"val_{key}") for key in ("top1", "miou", "similarity")}
    place = f"stage {epochs[-1]['stage']} epoch {epochs[-1]['epoch']}"
    return f"{line}; it is the saved model, the last one ({place}, {scores_text(last)}) is in {run.folder / LAST}"
