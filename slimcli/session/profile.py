"""What `slim profile` measures of a session's model, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slimcli.errors import SlimError, parameter
from slimcli.measure import operators as operator_counts
from slimcli.measure import profiling
from slimcli.measure.per_layer import per_layer
from slimcli.measure.rows import Row
from slimcli.measure.streams import advice, streams
from slimcli.progress import Progress, no_progress
from slimcli.runtimes.measuring import Place, profile_places
from slimcli.session.session import Session


@dataclass(frozen=True)
class Looks:
    """What is measured, and what beside the rows of the model: other methods, blocks, operators, one stream a core."""

    keep_rates: Sequence[float] | None = None
    batch_size: int | None = None
    seconds: float = 2.0
    exact_savings: bool = False
    against: Sequence[str] = ()
    per_layer: bool = False
    operators: bool = False
    streams: bool = False


@dataclass
class Profiled:
    """What was measured: rows and tables; lines to say after them, and warnings."""

    title: str
    facts: dict[str, Any]
    rows: list[Row]
    details: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**self.facts, "rows": self.rows, **self.details}


def profile_session(
    session: Session, looks: Looks, places: Sequence[Place] = (), progress: Progress = no_progress
) -> Profiled:
    """Measure the session's model where it is, in eager PyTorch, or in `places`."""
    model, where, dtype, rates = session.model, session.device, session.dtype, looks.keep_rates
    name = session.target.model_name
    batch = looks.batch_size or profiling.DEFAULT_BATCH[where.type]
    if looks.streams and where.type != "cpu":
        raise SlimError(f"{parameter('streams')} compares ways to use the cores of a CPU: choose device cpu")
    if places:
        rows = profile_places(model, rates, places, batch, looks.seconds, progress, looks.exact_savings)
        facts = {key: value for key, value in session.facts(batch).items() if key != "precision"}
        title = f"{name}: {where.type}, {facts['threads']} threads, batch {batch}"
        return Profiled(title, {"model": name, **facts}, rows)
    exact = looks.exact_savings
    rows = profiling.profile(model, rates, batch, where, dtype, looks.seconds, progress, exact, against=looks.against)
    kernels = profiling.attention(model, batch, where, dtype)
    done = Profiled(
        f"{name}: {session.conditions(batch)}",
        {"model": name, **session.facts(batch), "attention": kernels},
        rows,
        lines=[f"attention: {kernels['inference']} in inference, {kernels['training']} while lives learn"],
        warnings=profiling.kept_back(rows, model, batch, where, kernels["inference"]),
    )
    if looks.per_layer:
        done.details["per_layer"] = per_layer(model, rates, batch, where, dtype, progress=progress, exact_savings=exact)
    if looks.operators:
        done.details["operators"] = operator_counts.operators(model, rates, batch, where, dtype, exact, looks.against)
    if looks.streams:
        _compare_streams(done, session, looks, progress)
    return done


def _compare_streams(done: Profiled, session: Session, looks: Looks, progress: Progress) -> None:
    """Single images in one process and in several; that it cannot be measured is a warning."""
    done.details["streams"] = []
    try:
        found = streams(session.model, looks.keep_rates, session.dtype, looks.seconds, progress=progress)
    except (RuntimeError, OSError, AttributeError, TypeError) as error:
        done.warnings.append(f"streams were not compared: {error}")
        return
    done.details["streams"] = [vars(each) for each in found]
    if found:
        done.lines.append(advice(found))
    else:
        done.warnings.append("streams were not compared: this process may use one core")
