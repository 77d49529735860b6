"""A session's model measured without data: where it is, or in runtimes by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slimcli.errors import SlimError, parameter
from slimcli.measure import profiling
from slimcli.measure.operators import operators as count_operators
from slimcli.measure.per_layer import per_layer as time_layers
from slimcli.measure.rows import Row
from slimcli.measure.streams import Streams
from slimcli.measure.streams import advice as best_streams
from slimcli.measure.streams import streams as compare_streams
from slimcli.progress import Progress, no_progress
from slimcli.runtimes.measuring import Place, fastest, profile_places
from slimcli.session.session import Session


@dataclass(frozen=True)
class Looks:
    """What is measured beside the rows of the model: other methods, each block, the operators of a pass."""

    others: Sequence[str] = ()
    per_layer: bool = False
    operators: bool = False
    #: single images in one process and in a process a core
    streams: bool = False


@dataclass(frozen=True)
class Profiled:
    """What was found: the rows, the conditions in words, what runs the attention, and `details` by their name."""

    session: Session
    batch_size: int
    rows: list[Row]
    conditions: str
    facts: dict[str, Any]
    #: where time falls behind the arithmetic that is saved
    notes: tuple[str, ...] = ()
    attention: dict[str, str] | None = None
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    #: what is best here, in words
    advice: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """All of it as plain values."""
        attention = {"attention": self.attention} if self.attention is not None else {}
        model = self.session.target.model_name
        return {"model": model, **self.facts, **attention, "rows": self.rows, **self.details}


def profile_session(
    session: Session,
    keep_rates: Sequence[float] | None,
    batch_size: int | None = None,
    exact_savings: bool = False,
    seconds: float = 2.0,
    looks: Looks = Looks(),
    progress: Progress = no_progress,
) -> Profiled:
    """Measure the session's model where it is, in eager PyTorch, dense and at each keep rate."""
    model, where, dtype = session.model, session.device, session.dtype
    batch = batch_size or profiling.DEFAULT_BATCH[where.type]
    rows = profiling.profile(
        model, keep_rates, batch, where, dtype, seconds, progress, exact_savings, against=looks.others
    )
    details: dict[str, list[dict[str, Any]]] = {}
    if looks.per_layer:
        details["per_layer"] = time_layers(
            model, keep_rates, batch, where, dtype, progress=progress, exact_savings=exact_savings
        )
    if looks.operators:
        details["operators"] = count_operators(model, keep_rates, batch, where, dtype, exact_savings, looks.others)
    advice: list[str] = []
    warnings: list[str] = []
    if looks.streams:
        found, warnings = _streams(session, keep_rates, seconds, progress)
        details["streams"] = [asdict(each) for each in found]
        advice = [best_streams(found)] if found else []
    kernels = profiling.attention(model, batch, where, dtype)
    notes = warnings + profiling.kept_back(rows, model, batch, where, kernels["inference"])
    conditions, facts = session.conditions(batch), session.facts(batch)
    return Profiled(session, batch, rows, conditions, facts, tuple(notes), kernels, details, tuple(advice))


def _streams(
    session: Session, keep_rates: Sequence[float] | None, seconds: float, progress: Progress
) -> tuple[list[Streams], list[str]]:
    """Single images in one process and in several, or a warning that they could not be compared."""
    if session.device.type != "cpu":
        raise SlimError(f"{parameter('streams', 'true')}: compares ways to use the cores of a CPU: choose device cpu")
    try:
        found = compare_streams(session.model, keep_rates, session.dtype, seconds, progress=progress)
    except (RuntimeError, OSError, AttributeError, TypeError) as error:
        return [], [f"streams were not compared: {error}"]
    return found, [] if found else ["streams were not compared: this process may use one core"]


def profile_in_runtimes(
    session: Session,
    places: Sequence[Place],
    keep_rates: Sequence[float] | None,
    batch_size: int | None = None,
    exact_savings: bool = False,
    seconds: float = 2.0,
    progress: Progress = no_progress,
    warn: Callable[[str], None] = lambda _line: None,
) -> Profiled:
    """Measure the session's model in runtimes by name, dense and at each keep rate."""
    batch = batch_size or profiling.DEFAULT_BATCH[session.device.type]
    rows = profile_places(session.model, keep_rates, list(places), batch, seconds, progress, exact_savings, warn)
    # each row has a precision of its own
    facts = {key: value for key, value in session.facts(batch).items() if key != "precision"}
    facts["fastest"] = fastest(rows)
    return Profiled(session, batch, rows, f"{facts['device']}, {facts['threads']} threads, batch {batch}", facts)
