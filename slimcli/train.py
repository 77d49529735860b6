"""Training: the stages of a recipe in order, one flat loop, stoppable and resumable at any step."""

from __future__ import annotations

import copy
import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.data.dataset import IterableImageDataset
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from slimcli import data as datasets
from slimcli.classifier import match_classifier
from slimcli.device import environment, find_device, find_dtype, make_accelerator
from slimcli.documents import json_text
from slimcli.errors import Interrupted, SlimError
from slimcli.evaluate import Scores, check_classes, check_classifier, describe, evaluate, pooled
from slimcli.files import check_writable, write_file, write_json
from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe, StageSection, load_recipe
from slimcli.runs import CHECKPOINT, ENVIRONMENT, LAST, METRICS, RECIPE, SUMMARY, WEIGHTS, new_run_folder, point_latest
from slimcli.slimming import SlimModel
from slimcli.store import load_weights, save_model
from slimcli.targets import Target, from_recipe
from slimcli.track import Tracker, check_tracker

STEP_ROWS_PER_EPOCH = 20

Log = Callable[[str], None]


@dataclass
class Position:
    """Where a training stands: stages and epochs done, batches and updates done in the present ones."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    update: int = 0


@dataclass
class Run:
    """A run folder and what has been written to it. Only the main process writes."""

    folder: Path
    recipe: Recipe
    config: dict[str, Any]
    writes: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: float = -1.0
    position: Position = field(default_factory=Position)
    tracker: Tracker | None = None

    def add(self, row: dict[str, Any], step: int) -> None:
        """Add a line to metrics.jsonl. The file is replaced whole, so that it never ends in half a line.

        `step` counts batches from the start of the run, for the tracker.
        """
        self.rows.append(row)
        if self.tracker is not None:
            self.tracker.add(row, step)
        if self.writes:
            text = "".join(json_text(row, indent=None) + "\n" for row in self.rows)
            write_file(self.folder / METRICS, text.encode())

    def save(self, model: SlimModel, score: float) -> None:
        """Write the last model, and the best so far beside it."""
        if score > self.best:
            self.best = score
            if self.writes:
                save_model(self.folder, model, self.config)
        if self.writes:
            save_model(self.folder / LAST, model, self.config)

    def checkpoint(
        self, model: SlimModel, optimizer: Any, scaler: Any, epoch_sums: EpochSums, ema: ModelEmaV3 | None = None
    ) -> None:
        """Write everything that going on from the present position needs."""
        if not self.writes:
            return
        state = {
            "position": vars(self.position),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema": ema.module.state_dict() if ema is not None else None,
            "random": _random_state(),
            "sums": epoch_sums.state(),
            "rows": len(self.rows),
            "best": self.best,
        }
        write_file(self.folder / CHECKPOINT, lambda file: torch.save(state, file))

    def restore(self) -> dict[str, Any] | None:
        """Read the checkpoint, if there is one, and forget what was noted after it."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SlimError(
                f"{path}: is damaged ({error}): start again with `slim train {self.folder / RECIPE}`"
            ) from error
        self.position = Position(**state["position"])
        self.best = state["best"]
        lines = (self.folder / METRICS).read_text().splitlines() if state["rows"] else []
        self.rows = [json.loads(line) for line in lines[: state["rows"]]]
        return state


@dataclass
class EpochSums:
    """Sums over the batches of an epoch, kept on the device until they are asked for."""

    loss: float = 0.0
    hits: float = 0.0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def state(self) -> dict[str, float]:
        return dict(vars(self))

    def gathered(self, accelerator: Accelerator) -> EpochSums:
        """The sums over all processes; every process must ask."""
        if accelerator.num_processes == 1:
            return self
        own = torch.tensor([self.loss, self.hits, self.images], dtype=torch.float64, device=accelerator.device)
        loss, hits, images = accelerator.reduce(own, reduction="sum").tolist()
        return EpochSums(loss, hits, int(images), self.seconds, self.waited)


def train(
    recipe: Recipe,
    device_name: str = "auto",
    resume: Path | None = None,
    progress: Progress = no_progress,
    log: Log = lambda _line: None,
) -> tuple[Path, dict[str, Any]]:
    """Run a recipe's stages; return the run folder and its summary.

    `resume` is a run folder to go on with. Raises `Interrupted` after a checkpoint when asked to stop.
    """
    if not recipe.stages:
        raise SlimError(f"recipe {recipe.name} has no [[stages]]: there is nothing to train")
    check_writable(resume or recipe.output, "folder")
    device = find_device(device_name)
    check_tracker(recipe.tracker)
    accelerator = make_accelerator(device, recipe.precision, recipe.optimizer.accumulation, recipe.seed, recipe.tracker)
    device = accelerator.device
    set_seed(recipe.seed)

    train_set, val_set = datasets.open_splits(recipe.data, recipe.seed)
    if recipe.data.cache:
        for images in (train_set, val_set):
            datasets.keep_decoded(images, recipe.data, progress)
    target = from_recipe(recipe, recipe.name, train_set.class_names)
    train_set, val_set = match_classifier(target, train_set, val_set, log)
    class_names = train_set.class_names
    model = target.model.to(device)
    for line in target.notes:
        log(line)
    if not target.has_classifier:
        log(f"{recipe.model.weights} has no classifier for these classes: it starts untrained")
    teacher = _teacher(target, recipe, class_names)
    prepare = datasets.preprocessing(model.backbone.preprocessing(), recipe.data)
    config = model_config(target, prepare, class_names)

    workers = datasets.num_workers(recipe.data, train_set, device)
    batch_size = recipe.data.batch_size
    learn_from = datasets.train_loader(train_set, prepare, recipe.augmentation, batch_size, workers, device)
    check_on = datasets.eval_loader(val_set, prepare, batch_size, workers, device)
    for line in dict.fromkeys((*train_set.notes, *val_set.notes)):
        log(line)
    if not isinstance(train_set, IterableImageDataset):
        learn_from, check_on = accelerator.prepare(learn_from, check_on)

    run = _open_run(recipe, config, resume, accelerator)
    state = run.restore() if resume else None
    if state is None:
        if run.writes:
            warning = point_latest(run.folder)
            if warning is not None:
                log(f"warning: {warning}")
            write_file(run.folder / RECIPE, recipe.to_toml().encode())
            write_json(run.folder / ENVIRONMENT, environment(device))
        start = accuracy(model, "none", check_on, accelerator, progress, teacher)
        run.tracker = Tracker(accelerator, recipe, run.folder, log)
        run.add({"event": "start", **start.row()}, 0)
        log(f"dense model as given: {_said(start.row())} on {start.count} images")
    else:
        model.load_state_dict(state["model"])
        run.tracker = Tracker(accelerator, recipe, run.folder, log)
        log(f"going on with {run.folder} from {_place(run.position, recipe)}")

    try:
        with _stop_signals() as stop:
            for number, stage in enumerate(recipe.stages):
                if number < run.position.stage:
                    continue
                _run_stage(
                    number, stage, run, model, teacher, learn_from, check_on, accelerator, state, stop, progress, log
                )
                state = None
    finally:
        run.tracker.finish()

    summary = _summarise(run, model, check_on, val_set, prepare, workers, accelerator, progress)
    return run.folder, summary


def _run_stage(
    number: int,
    stage: StageSection,
    run: Run,
    model: SlimModel,
    teacher: SlimModel | None,
    learn_from: DataLoader[Any],
    check_on: DataLoader[Any],
    accelerator: Accelerator,
    state: dict[str, Any] | None,
    stop: Callable[[], bool],
    progress: Progress,
    log: Log,
) -> None:
    """One stage. `state` is a checkpoint taken in it, or None at its start."""
    recipe = run.recipe
    choose_parameters(model, stage)
    model.mode = stage.mode
    model.grad_checkpointing = recipe.optimizer.grad_checkpointing
    updates_per_epoch = -(-len(learn_from) // recipe.optimizer.accumulation)
    optimizer = make_optimizer(model, stage, recipe)
    scheduler = make_scheduler(optimizer, stage, updates_per_epoch)
    # averages from the start of the stage on: the decay grows from 0 to what is asked for
    ema = ModelEmaV3(model, decay=stage.ema, use_warmup=True) if stage.ema is not None else None
    measured_model = model if ema is None else cast(SlimModel, ema.module)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    sums = EpochSums()
    if state is not None and state["optimizer"] is not None:
        optimizer.load_state_dict(state["optimizer"])
        sums = EpochSums(**state["sums"])
        if ema is not None:
            ema.module.load_state_dict(state["ema"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    mixup, by_labels = make_criterion(recipe, model) if stage.uses_labels else (None, None)
    criterion = StageLoss(stage, teacher, by_labels)
    model.returns = "embedding" if stage.loss == "cosine" else "both" if stage.features > 0 else "output"
    measured = "cosine x 100" if stage.loss == "cosine" else "top-1"
    schedule, temperature = model.schedule, model.temperature
    schedules = {rate: model.at_keep_rate(rate) for rate in stage.keep_rates or ()}
    title = f"stage {number + 1}/{len(recipe.stages)} ({stage.title})"
    at = run.position
    written = time.monotonic()

    for epoch in range(at.epoch, stage.epochs):
        epochs_before = sum(s.epochs for s in recipe.stages[:number]) + epoch
        _seed_epoch(recipe.seed, epochs_before, accelerator.process_index)
        _set_epoch(learn_from, epochs_before)
        set_training(model, stage)
        resumed_at = at.batch
        total = len(learn_from)
        interval = max(1, total // STEP_ROWS_PER_EPOCH)
        clock = time.perf_counter()
        for batch, (images, targets) in enumerate(learn_from):
            if batch < resumed_at:
                continue
            if batch == resumed_at > 0 and state is not None:
                _restore_random(state["random"])
                clock = time.perf_counter()
            arrived = time.perf_counter()
            sums.waited += arrived - clock
            images, targets = images.to(accelerator.device), targets.to(accelerator.device)
            lr = _step_schedule(scheduler, optimizer, at.update)
            with accelerator.accumulate(wrapped):
                mixed, labels = mixup(images, targets) if mixup else (images, targets)
                if stage.end_temperature is not None:
                    share = at.update / max(1, stage.epochs * updates_per_epoch - 1)
                    model.temperature = temperature + share * (stage.end_temperature - temperature)
                passes = keep_rates_of_step(stage)
                value = 0.0
                # several processes wait for the gradients of all weights after each pass
                share_blocks = len(passes) > 1 and accelerator.num_processes == 1
                sharing = model.untouched_blocks_once() if share_blocks else nullcontext()
                with accelerator.autocast():
                    known = criterion.known(mixed)
                with sharing:
                    for keep_rate in passes:
                        model.schedule = schedule if keep_rate is None else schedules[keep_rate]
                        with accelerator.autocast():
                            output, embedding = wrapped(mixed), None
                            if model.returns == "both":
                                output, embedding = output
                            elif model.returns == "output":
                                output = model.backbone.logits(output)
                            loss = criterion(output.float(), embedding, labels, known)
                            loss = loss + model.own_loss(mixed, teacher)
                        accelerator.backward(loss / len(passes))
                        value += loss.item() / len(passes)
                if accelerator.sync_gradients:
                    if recipe.optimizer.clip_grad is not None:
                        accelerator.clip_grad_norm_(wrapped.parameters(), recipe.optimizer.clip_grad)
                    at.update += 1
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None and accelerator.sync_gradients:
                    ema.update(model, at.update)
            at.batch = batch + 1
            if not numpy.isfinite(value):
                raise SlimError(f"{title}: the loss became {value} at batch {batch + 1}: try a smaller lr or clip_grad")
            sums.loss += value * images.shape[0]
            hit = (1 - loss.detach()) * len(images) if stage.loss == "cosine" else (output.argmax(1) == targets).sum()
            sums.hits += float(hit)
            sums.images += images.shape[0]
            sums.seconds += time.perf_counter() - clock
            clock = time.perf_counter()

            speed = sums.images / sums.seconds * accelerator.num_processes
            label = (
                f"stage {number + 1} epoch {epoch + 1}/{stage.epochs}  loss {sums.loss / sums.images:.3f}  "
                f"{measured} {100 * sums.hits / sums.images:.1f}  lr {lr:.0e}  {speed:.0f} img/s"
            )
            progress(label, batch + 1, total)
            if at.batch % interval == 0:
                run.add(
                    {"event": "step", **_row(number, stage, epoch, at, sums.gathered(accelerator), lr, speed)},
                    epochs_before * total + at.batch,
                )
            # gradients that are still adding up are in no checkpoint
            if accelerator.sync_gradients:
                stopping = _any_process(stop(), accelerator)
                if stopping or (time.monotonic() - written) / 60 >= recipe.checkpoint_minutes:
                    run.checkpoint(accelerator.unwrap_model(wrapped), optimizer, accelerator.scaler, sums, ema)
                    written = time.monotonic()
                if stopping:
                    raise Interrupted(str(run.folder))

        mode = "none" if stage.mode == "none" else "hard"
        model.schedule, model.temperature = schedule, temperature
        found = accuracy(measured_model, mode, check_on, accelerator, progress, teacher)
        model.mode = stage.mode
        row = _row(number, stage, epoch, at, sums.gathered(accelerator), lr, speed)
        run.add(
            {"event": "epoch", **row, **{f"val_{key}": value for key, value in found.row().items()}},
            (epochs_before + 1) * total,
        )
        run.save(measured_model, found.score)
        log(
            f"{title} epoch {epoch + 1}/{stage.epochs}: loss {row['loss']:.4f}, "
            f"train {_said(row)}, "
            f"{'dense' if stage.mode == 'none' else 'slim'} val {_said(found.row())}, "
            f"{row['images_per_second']:.0f} img/s, {sums.seconds:.0f} s"
        )
        if sums.waited > 0.25 * sums.seconds and sums.seconds > 5:
            log(
                f"the loader held training up for {100 * sums.waited / sums.seconds:.0f} % of the time: "
                "raise data.workers, set data.cache = true if the images fit in memory, or shrink them on disk"
            )
        at.epoch, at.batch = epoch + 1, 0
        sums = EpochSums()
        if epoch + 1 == stage.epochs:
            run.position = Position(stage=number + 1)
            if ema is not None:
                model.load_state_dict(ema.module.state_dict())
            run.checkpoint(model, None, accelerator.scaler, sums)
        else:
            run.checkpoint(model, optimizer, accelerator.scaler, sums, ema)
        state = None
        written = time.monotonic()
        if _any_process(stop(), accelerator):
            raise Interrupted(str(run.folder))
    accelerator.free_memory(wrapped, optimizer)


def choose_parameters(model: SlimModel, stage: StageSection) -> None:
    """Let the life head, the backbone or both learn; freeze the rest."""
    model.selector.requires_grad_(stage.learns in ("life", "both"))
    model.model.requires_grad_(stage.learns in ("backbone", "both"))


def set_training(model: SlimModel, stage: StageSection) -> None:
    """Training mode for what learns; a frozen backbone runs without dropout and stochastic depth."""
    model.train()
    if stage.learns == "life":
        model.model.eval()


def make_optimizer(model: SlimModel, stage: StageSection, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer over what learns; norms, biases and position embeddings without weight decay."""
    section = recipe.optimizer
    groups: list[dict[str, Any]] = []
    if stage.learns in ("life", "both"):
        groups += param_groups_weight_decay(model.selector, stage.weight_decay)
    if stage.learns in ("backbone", "both"):
        dense = model.model
        undecayed: set[str] = getattr(dense, "no_weight_decay", set)()
        if section.layer_decay is not None:
            backbone = param_groups_layer_decay(dense, stage.weight_decay, undecayed, layer_decay=section.layer_decay)
        else:
            backbone = param_groups_weight_decay(dense, stage.weight_decay, undecayed)
        groups += [{**group, "lr": stage.backbone_lr or stage.lr} for group in backbone]
    groups = [{"lr": stage.lr, **group} for group in groups if group["params"]]
    extra = {key: getattr(section, key) for key in ("betas", "eps") if getattr(section, key) is not None}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=section.opt, lr=stage.lr, weight_decay=stage.weight_decay, momentum=section.momentum, **extra
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise SlimError(f"optimizer.opt = {section.opt!r}: timm cannot make it: {error}") from error
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, stage: StageSection, updates_per_epoch: int) -> Any:
    """timm's learning-rate schedule, stepped once an update; None for a constant rate without warm-up."""
    updates = stage.epochs * updates_per_epoch
    warmup = min(round(stage.warmup_epochs * updates_per_epoch), updates - 1)
    if stage.schedule == "constant" and not warmup:
        return None
    constant = stage.schedule == "constant"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if constant else stage.schedule,
        num_epochs=updates - warmup,
        decay_epochs=updates + 1 if constant else max(1, (updates - warmup) // 3),
        warmup_epochs=warmup,
        warmup_lr=stage.warmup_lr,
        warmup_prefix=True,
        min_lr=stage.min_lr,
        cooldown_epochs=0,
    )
    return scheduler


def make_criterion(recipe: Recipe, model: SlimModel) -> tuple[Mixup | None, nn.Module]:
    """timm's mixup, where the recipe asks for it, and the cross-entropy that goes with it."""
    section = recipe.augmentation
    if section.enabled and (section.mixup > 0 or section.cutmix > 0):
        mixup = Mixup(
            mixup_alpha=section.mixup,
            cutmix_alpha=section.cutmix,
            prob=section.mixup_prob,
            switch_prob=section.mixup_switch_prob,
            label_smoothing=section.label_smoothing,
            num_classes=model.architecture().num_outputs,
        )
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(section.label_smoothing)


def keep_rates_of_step(stage: StageSection) -> list[float | None]:
    """The keep rates that one step trains: the highest, the lowest and a random one in between; None is the recipe's.

    The sandwich rule of slimmable networks (Yu and Huang, 2019).
    """
    if stage.keep_rates is None:
        return [None]
    lowest, *between, highest = sorted(stage.keep_rates)
    chosen = [between[int(torch.randint(len(between), ()))]] if between else []
    return [highest, *chosen, lowest]


class Known(NamedTuple):
    """What the dense model makes of a batch, float32: logits (B, C) and image embeddings (B, E), as far as needed."""

    logits: Tensor | None = None
    embedding: Tensor | None = None


class StageLoss:
    """The loss of a stage: logits (B, C), embeddings (B, E), classes, and what the dense model knows, to a number.

    `by_labels` is the cross-entropy of a stage that uses labels. The teacher neither learns nor is saved.
    """

    def __init__(self, stage: StageSection, teacher: SlimModel | None, by_labels: nn.Module | None) -> None:
        self.stage, self.teacher, self.by_labels = stage, teacher, by_labels

    @torch.no_grad()
    def known(self, images: Tensor) -> Known:
        """What the dense model makes of the images, as far as the loss uses it."""
        if not self.stage.uses_teacher:
            return Known()
        assert self.teacher is not None
        if self.stage.loss == "cosine":
            return Known(embedding=self.teacher.embedding(images).float())
        if self.stage.features > 0:
            logits, embedding = self.teacher.logits_and_embedding(images)
            return Known(logits.float(), embedding.float())
        return Known(self.teacher.logits(images).float())

    def __call__(self, output: Tensor, embedding: Tensor | None, labels: Tensor, known: Known) -> Tensor:
        """`output` are logits, or with the loss `cosine` embeddings; `embedding` is given where features count."""
        stage = self.stage
        if stage.loss == "cosine":
            assert known.embedding is not None
            return 1 - nn.functional.cosine_similarity(output, known.embedding, dim=-1).mean()
        loss = output.new_zeros(()) if self.by_labels is None else self.by_labels(output, labels)
        if stage.loss != "labels":
            assert known.logits is not None
            taught = distillation(output, known.logits, stage.distill_temperature)
            loss = taught if stage.loss == "distill" else (loss + taught) / 2
        if embedding is not None and known.embedding is not None:
            loss = loss + stage.features * feature_error(embedding.float(), known.embedding)
        return loss


def feature_error(features: Tensor, dense: Tensor) -> Tensor:
    """Squared error of embeddings (B, E) over the variance of the dense model's: 0 if equal, 1 for their mean."""
    return nn.functional.mse_loss(features, dense) / dense.var()


def distillation(logits: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the dense model's predictions, both softened (Hinton et al., 2015)."""
    logs = (logits / temperature).log_softmax(dim=-1), (dense / temperature).log_softmax(dim=-1)
    return nn.functional.kl_div(*logs, log_target=True, reduction="batchmean") * temperature**2


def _teacher(target: Target, recipe: Recipe, class_names: list[str] | None) -> SlimModel | None:
    """A copy of the dense model as it is before training, where a stage learns from it or it has no classifier."""
    model = target.model
    if any(stage.loss != "cosine" for stage in recipe.stages):
        check_classifier(model)
    check_classes(model, class_names)
    compared = any(stage.uses_teacher for stage in recipe.stages) or model.backbone.compares_embeddings
    if not compared and not model.needs_teacher:
        return None
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    teacher.mode = "none"
    return teacher


@torch.no_grad()
def accuracy(
    model: SlimModel,
    mode: str,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    progress: Progress,
    teacher: SlimModel | None = None,
) -> Scores:
    """Accuracy of the model in `mode` on all images of all processes, in the precision of the training.

    With a `teacher` also the cosine to its image embeddings; without a classifier that alone.
    """
    model.eval()
    found = Scores()
    for batch, (images, targets) in enumerate(loader):
        images = images.to(accelerator.device)
        with accelerator.autocast(), model.running(mode=mode):
            if model.architecture().num_outputs:
                logits = model.logits(images).float()
                found.accuracy.add(*accelerator.gather_for_metrics((logits, targets.to(accelerator.device))))
            if teacher is not None:
                pair = pooled(model.embedding(images)), pooled(teacher.embedding(images))
                found.similarity.add(*accelerator.gather_for_metrics(pair))
        progress("validating", batch + 1, len(loader))
    return found


def model_config(target: Target, prepare: dict[str, Any], class_names: list[str] | None) -> dict[str, Any]:
    """What config.json says beside the schedule; the data's folder is written as an absolute path."""
    content = dict(target.config)
    content["preprocessing"] = prepare
    content["class_names"] = class_names
    if target.recipe is not None:
        section = target.recipe.data
        if section.root is not None:
            section = section.model_copy(update={"root": section.root.resolve()})
        content["data"] = section.model_dump(mode="json", exclude_none=True)
    return content


def unfinished_run(recipe: Recipe) -> Path:
    """The newest run of this recipe that has not ended; `SlimError` if there is none or the recipe has changed."""
    runs = sorted(recipe.output.glob(f"{recipe.name}-*/{RECIPE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in runs:
        if (path.parent / SUMMARY).exists():
            continue
        old = load_recipe(path, check_files=False)
        before, now = old.model_dump(mode="json"), recipe.model_dump(mode="json")
        changed = [key for key in now if before[key] != now[key] and key != "checkpoint_minutes"]
        if changed:
            raise SlimError(
                f"{path.parent}: was started with another recipe (differs in {', '.join(changed)}): "
                f"go on with it as it was by `slim train --resume {path.parent}`, or start anew without --resume"
            )
        return path.parent
    raise SlimError(f"{recipe.output}: has no unfinished run of {recipe.name}: start one without --resume")


def _open_run(recipe: Recipe, config: dict[str, Any], resume: Path | None, accelerator: Accelerator) -> Run:
    folder = resume
    if folder is None:
        made = [str(new_run_folder(recipe.output, recipe.name)) if accelerator.is_main_process else ""]
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(made)
        folder = Path(made[0])
    return Run(folder, recipe, config, accelerator.is_main_process)


def _summarise(
    run: Run,
    model: SlimModel,
    check_on: DataLoader[Any],
    val_set: Any,
    prepare: dict[str, Any],
    workers: int,
    accelerator: Accelerator,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the best model dense against slim on the main process, and write the summary that ends a run."""
    summary: dict[str, Any] = {}
    if accelerator.is_main_process:
        load_weights(model, run.folder / WEIGHTS)
        device = accelerator.device
        dtype = find_dtype(run.recipe.precision, device)
        batch_size = run.recipe.data.batch_size
        loader = datasets.eval_loader(val_set, prepare, batch_size, workers, device)
        trained = any(stage.mode != "none" for stage in run.recipe.stages)
        rows = evaluate(model, loader, None if trained else [], device, dtype, progress)
        start = next(row for row in run.rows if row["event"] == "start")
        facts = environment(device)
        summary = {
            "run": str(run.folder),
            "model": run.recipe.model.name,
            "device": facts["device"],
            "threads": facts["threads"],
            "precision": run.recipe.precision,
            "batch_size": batch_size,
            "versions": facts["versions"],
            "before": {key: start[key] for key in ("top1", "top5", "loss", "similarity") if key in start},
            "rows": rows,
        }
        write_json(run.folder / SUMMARY, summary)
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return summary


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """What training would do: the model, what learns in each stage, the schedule and the cost. Trains nothing."""
    check_writable(recipe.output, "folder")
    check_tracker(recipe.tracker)
    train_set, val_set = datasets.open_splits(recipe.data, recipe.seed)
    target = from_recipe(recipe, recipe.name, train_set.class_names)
    train_set, _ = match_classifier(target, train_set, val_set)
    _teacher(target, recipe, train_set.class_names)
    images = len(train_set)
    stages = []
    for stage in recipe.stages:
        choose_parameters(target.model, stage)
        learning = sum(p.numel() for p in target.model.parameters() if p.requires_grad)
        steps = images // recipe.data.batch_size // recipe.optimizer.accumulation * stage.epochs
        stages.append({**stage.model_dump(exclude_none=True), "learning_parameters": learning, "updates": steps})
    model = target.model
    return {
        "model": recipe.model.name,
        "train_images": images,
        "rows": [describe(model, None), describe(model, model.schedule, model.exact_savings)],
        "stages": stages,
    }


def _row(
    number: int, stage: StageSection, epoch: int, at: Position, sums: EpochSums, lr: float, speed: float
) -> dict[str, Any]:
    return {
        "stage": number + 1,
        "learns": stage.learns,
        "mode": stage.mode,
        "epoch": epoch + 1,
        "batch": at.batch,
        "loss": round(sums.loss / sums.images, 5),
        **_measured(stage, sums),
        "lr": lr,
        "images_per_second": round(speed, 2),
        "seconds": round(sums.seconds, 2),
    }


def _measured(stage: StageSection, sums: EpochSums) -> dict[str, float]:
    """What training itself measured: top-1 in percent, or the mean cosine."""
    share = sums.hits / sums.images
    return {"similarity": round(share, 5)} if stage.loss == "cosine" else {"top1": round(100 * share, 3)}


def _said(row: dict[str, Any]) -> str:
    """Top-1 and cosine of a row in words, for the log."""
    said = [f"top-1 {row['top1']:.2f} %"] if "top1" in row else []
    return ", ".join([*said, *([f"cosine {row['similarity']:.4f}"] if "similarity" in row else [])])


def _place(at: Position, recipe: Recipe) -> str:
    if at.stage >= len(recipe.stages):
        return "the end of its last stage"
    return f"stage {at.stage + 1}, epoch {at.epoch + 1}, batch {at.batch + 1}"


def _step_schedule(scheduler: Any, optimizer: Any, update: int) -> float:
    """Set the learning rates of the coming update; return the highest."""
    if scheduler is not None:
        scheduler.step(update)
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tell sampler and transforms which epoch it is: their randomness follows from it."""
    dataset = loader.dataset
    if isinstance(dataset, datasets.ImageSamples):
        dataset.epoch.fill_(epoch)
    elif hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)


def _seed_epoch(seed: int, epoch: int, process: int) -> None:
    """Seed everything for an epoch, so that one that is run again runs the same."""
    set_seed((seed * 1_000_003 + epoch * 1_009 + process) % 2**32)


def _random_state() -> dict[str, Any]:
    kind, keys, place, has_gauss, cached = cast(tuple[Any, ...], numpy.random.get_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(numpy.int64)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, place, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, words.numpy().astype(numpy.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: all must stop at the same batch."""
    if accelerator.num_processes == 1:
        return flag
    flags: Tensor = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return bool(flags.item() > 0)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the present batch; the second stops at once."""
    asked = False

    def ask(number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: leave signals to whoever is
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
