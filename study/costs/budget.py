"""What a study has spent, what is left, and which limit ends it. Pure functions over what is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from study.config import COST, Budget, Objective, Price
from study.records import Manifest, StudyPaths, TrialRecord, read_events
from trainables.errors import InputError

SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Limit:
    """One limit of a budget.

    Attributes:
        name: field of `Budget`.
        spent: how much of it is used up.
        limit: how much there is.
        unit: of both.
    """

    name: str
    spent: float
    limit: float
    unit: str

    @property
    def left(self) -> float:
        """What remains, never below 0."""
        return max(0.0, self.limit - self.spent)

    @property
    def reached(self) -> bool:
        """Whether nothing remains."""
        return self.spent >= self.limit

    def __str__(self) -> str:
        return f"budget.{self.name}: {self.spent:.4g} of {self.limit:.4g} {self.unit}"


@dataclass(frozen=True)
class Usage:
    """What a study has used.

    Attributes:
        trials: ended trials, recipes among them.
        planned_trials: how many there shall be.
        wall_seconds: drivers worked on it, all sessions together.
        device_seconds: held by all trials, whatever their state.
        growth: hypervolume share after each complete trial, in [0, 1].
    """

    trials: int
    planned_trials: int
    wall_seconds: float
    device_seconds: float
    growth: Sequence[float]


def usage(
    paths: StudyPaths,
    budget: Budget,
    objectives: Sequence[Objective],
    records: Sequence[TrialRecord],
    manifests: Sequence[Manifest],
    wall_seconds: float,
) -> Usage:
    """What the records, manifests and logs of a study add up to.

    Args:
        paths: of the study.
        budget: of the study.
        objectives: of the study.
        records: all trials of the ledger.
        manifests: all ended trials.
        wall_seconds: see `study.ledger.lease.worked_seconds`.
    """
    from study.front.hypervolume import hypervolume_history

    costs = {manifest.key: manifest.cost.get("device_seconds") for manifest in manifests}
    held = [costs.get(record.key) or _logged_seconds(paths, record) for record in records if record.state != "waiting"]
    complete = [manifest for manifest in manifests if manifest.state == "complete"]
    return Usage(
        trials=len(costs),
        planned_trials=planned_trials(budget, records),
        wall_seconds=wall_seconds,
        device_seconds=float(sum(held)),
        growth=[share for *_, share in hypervolume_history(complete, objectives)],
    )


def planned_trials(budget: Budget, records: Sequence[TrialRecord]) -> int:
    """Recipes and searched trials, also where more were searched than the budget has now."""
    searched = sum(record.searched for record in records)
    return len(records) - searched + max(searched, budget.trials)


def _logged_seconds(paths: StudyPaths, record: TrialRecord) -> float:
    """Of a trial without a result: what its last rung said."""
    rungs = (event.metrics.get(COST, 0.0) for event in read_events(paths.events(record.key)))
    return max(rungs, default=0.0)


def limits(budget: Budget, price: Price, device: str, used: Usage) -> list[Limit]:
    """Every limit of the budget with what is spent of it, the trials first.

    Args:
        budget: of the study.
        price: of the study.
        device: kind of the devices that are held.
        used: what the study has used.

    Raises:
        InputError: money is limited, and the device has no price.
    """
    wall, devices = used.wall_seconds / SECONDS_AN_HOUR, used.device_seconds / SECONDS_AN_HOUR
    found = [Limit("trials", used.trials, used.planned_trials, "trials")]
    if budget.wall_hours is not None:
        found.append(Limit("wall_hours", wall, budget.wall_hours, "hours"))
    if budget.device_hours is not None:
        found.append(Limit("device_hours", devices, budget.device_hours, "device-hours"))
    if budget.money is not None:
        found.append(Limit("money", money(price, device, devices, wall), budget.money, price.currency))
    if budget.plateau_trials is not None:
        still = stagnation(used.growth, budget.plateau_growth)
        found.append(Limit("plateau_trials", still, budget.plateau_trials, "trials without growth"))
    return found


def money(price: Price, device: str, device_hours: float, wall_hours: float) -> float:
    """Device-hours and the head node, in the currency of `price`.

    Raises:
        InputError: the device was held and has no price.
    """
    if device_hours and device not in price.device_hour:
        known = ", ".join(price.device_hour) or "none"
        raise InputError(
            f"price.device_hour: no price for {device!r}, which trials run on; prices are for {known}. Give "
            f"--price.device-hour {device}=PRICE, or name the kind by --price.device"
        )
    return device_hours * price.device_hour.get(device, 0.0) + wall_hours * price.head_hour


def stagnation(shares: Sequence[float], growth: float) -> int:
    """Over how many of the last complete trials the hypervolume share grew by no more than `growth`."""
    return sum(shares[-1] - earlier <= growth for earlier in shares[:-1])


def reached(found: Iterable[Limit]) -> Limit | None:
    """The first limit that is reached, if one is. Then no further trial starts."""
    return next((limit for limit in found if limit.reached), None)


def ended_by(found: Iterable[Limit], records: Iterable[TrialRecord]) -> Limit | None:
    """The limit that ended the study; None while one of its trials runs, or may still start."""
    return None if any(record.state == "running" for record in records) else reached(found)


def remaining_seconds(found: Iterable[Limit], wall_seconds: float) -> float | None:
    """Wall time until the first limit is reached, if all go on as they did; None where nothing is spent yet."""
    left = [limit.left / limit.spent for limit in found if limit.spent > 0 and limit.name != "plateau_trials"]
    return min(left) * wall_seconds if left and wall_seconds > 0 else None


def device_kind(price: Price, found: Iterable[str]) -> str:
    """The kind of device to count with: as configured, or the dearest of those that the cluster has.

    Args:
        price: of the study.
        found: kinds as Ray names them (`L4`, `A100`, ...); none where trials run on CPUs.
    """
    if price.device is not None:
        return price.device
    kinds = [kind.lower() for kind in found] or ["cpu"]
    return max(kinds, key=lambda kind: price.device_hour.get(kind, -1.0))
