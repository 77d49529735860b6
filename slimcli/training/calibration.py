"""The kind of stage that calibrates: the life head is taught, and how patches leave is searched, without labels."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from slimcli import data as datasets
from slimcli.calibration.effort import brief_steps, fit_steps, tokens_of
from slimcli.calibration.fit import batch_images
from slimcli.calibration.observe import (
    MOST_IN_A_BATCH,
    candidate_life_layers,
    fewest_checked,
    images_that_fit,
    share_out,
    split,
)
from slimcli.calibration.search import Calibration, fit_and_search
from slimcli.calibration.workflow import Goal, aim
from slimcli.device import find_dtype
from slimcli.measure.evaluation import first_images
from slimcli.progress import Progress
from slimcli.store.model_folder import slimming_config
from slimcli.training.checkpoint import adopt_slimming, seed_epoch
from slimcli.training.control import Control
from slimcli.training.undivided import UndividedStage

#: candidates that a search runs over the check images, and what of a forward pass each takes
CANDIDATES, CANDIDATE_SHARE = 17, 0.6
#: what of a forward pass a step of fitting the life head to 32 images takes
FIT_SHARE = 0.2


class CalibrationStage(UndividedStage):
    """Does what `slim calibrate` does, on the training images, at the cost of the recipe's schedule."""

    @property
    def updates(self) -> int:
        return 0

    @property
    def taught(self) -> nn.Module:
        return self.session.model.selector

    @property
    def teaching(self) -> float:
        count, checked, batch = self._numbers()
        steps, tokens = fit_steps(count), tokens_of(self.session.model)
        layers = len(self._life_layers())
        fits = steps + (layers * brief_steps(steps, tokens, layers) if layers > 1 else 0)
        candidates = (CANDIDATES if layers > 1 else CANDIDATES // 2) * checked / batch
        whole = (
            (count + checked) / batch + candidates * CANDIDATE_SHARE + fits * FIT_SHARE * batch_images(tokens) / batch
        )
        # in batches of the recipe's size
        return whole * batch / self.session.recipe.data.batch_size

    def _life_layers(self) -> tuple[int, ...]:
        model = self.session.model
        keeps = self.section.keep_schedule
        return (model.schedule.life_layer,) if keeps else candidate_life_layers(model.backbone.depth)

    def _numbers(self) -> tuple[int, int, int]:
        """Images to fit on, others to compare candidates on, and the size of their batches."""
        session = self.session
        wanted = images_that_fit(session.model.backbone, self.section.images, len(self._life_layers()))
        fit, check = share_out(wanted, len(session.train_set), fewest=fewest_checked(session.model))
        return fit, check, min(session.recipe.data.batch_size, MOST_IN_A_BATCH)

    def teach(self, control: Control, progress: Progress) -> tuple[dict[str, Any], str]:
        done, model = self._calibrate(progress), self.session.model
        best = done.tried[0]
        found = {
            "batch": len(self.session.learn_from),
            "images": self._numbers()[0],
            "apart": round(best.apart, 5),
            "agreement": round(best.agreement, 2),
        }
        counts = " ".join(str(count) for count in model.patches_per_layer[model.schedule.life_layer :])
        return found, (
            f"life layer {model.schedule.life_layer}, then {counts} patches, the best of {len(done.tried)} ways tried"
        )

    def _calibrate(self, progress: Progress) -> Calibration:
        """Calibrate a copy of the model, which may be rounded to another dtype, and adopt what it found."""
        session, model = self.session, self.session.model
        seed_epoch(session.recipe.seed, self.epochs_before, 0)
        count, checked, _ = self._numbers()
        fit_on, check_on = split(self._images(count + checked), count)
        found = copy.deepcopy(model).requires_grad_(False)
        dtype = find_dtype(session.recipe.precision, session.device)
        asked = Goal(keep_schedule=self.section.keep_schedule, purpose=self.section.purpose)
        goal, _ = aim(model, asked)
        done = fit_and_search(
            found, goal, fit_on, check_on, count, session.device, dtype, progress, purpose=asked.purpose
        )
        best = done.tried[0]
        adopt_slimming(model, slimming_config(found))
        # as fitted, in float32
        model.selector.load_state_dict(done.fitted[best.schedule.life_layer].state)
        model.to(session.device)
        self._share()
        return done

    def _images(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Training images of all classes, prepared as for inference, in batches."""
        session = self.session
        dataset = datasets.shuffled(datasets.open_dataset(session.recipe.data, train=True))
        batch = self._numbers()[2]
        loader = datasets.eval_loader(dataset, session.prepare, batch, session.workers, session.device)
        return list(first_images(loader, count))

    def _share(self) -> None:
        """What the main process found is what all go on with: machines may round otherwise."""
        if self.session.accelerator.num_processes == 1:
            return
        model = self.session.model
        config = [slimming_config(model)]
        torch.distributed.broadcast_object_list(config)
        adopt_slimming(model, config[0])
        for value in model.selector.state_dict().values():
            torch.distributed.broadcast(value, 0)

    @torch.no_grad()
    def seconds(self) -> float:
        session, model = self.session, self.session.model
        images = self._images(self._numbers()[2])[0][0].to(session.device)
        model.eval()
        times = []
        for _ in range(3):
            clock = time.perf_counter()
            with model.running(mode="none"):
                model.logits(images)
            times.append(time.perf_counter() - clock)
        return min(times) / len(images) * session.recipe.data.batch_size * self.teaching
