"""What a study has spent, what is left, and which limit ends it. Pure functions over what is recorded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from study.config import Budget, Price
from study.records import Manifest, TrialRecord
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
        held: device-seconds of all attempts of all trials, by kind of device.
        growth: hypervolume share after each complete trial, in [0, 1].
    """

    trials: int
    planned_trials: int
    wall_seconds: float
    held: Mapping[str, float]
    growth: Sequence[float]

    @property
    def device_seconds(self) -> float:
        """Of all kinds together."""
        return sum(self.held.values())


def usage(
    budget: Budget,
    records: Sequence[TrialRecord],
    manifests: Sequence[Manifest],
    growth: Sequence[float],
    held: Mapping[str, float],
    wall_seconds: float,
) -> Usage:
    """What the records, manifests and attempts of a study add up to.

    Args:
        budget: of the study.
        records: all trials of the ledger.
        manifests: all ended trials.
        growth: see `study.front.hypervolume.History.shares`.
        held: see `study.ledger.attempts.Attempts.held`.
        wall_seconds: see `study.ledger.lease.worked_seconds`.
    """
    return Usage(
        trials=len(manifests),
        planned_trials=planned_trials(budget, records),
        wall_seconds=wall_seconds,
        held=held,
        growth=growth,
    )


def planned_trials(budget: Budget, records: Sequence[TrialRecord]) -> int:
    """Recipes and searched trials, also where more were searched than the budget has now."""
    searched = sum(record.searched for record in records)
    return len(records) - searched + max(searched, budget.trials)


def limits(budget: Budget, price: Price, used: Usage) -> list[Limit]:
    """Every limit of the budget with what is spent of it, the trials first.

    Args:
        budget: of the study.
        price: of the study.
        used: what the study has used.

    Raises:
        InputError: money is limited, and a device that was held has no price.
    """
    wall, devices = used.wall_seconds / SECONDS_AN_HOUR, used.device_seconds / SECONDS_AN_HOUR
    found = [Limit("trials", used.trials, used.planned_trials, "trials")]
    if budget.wall_hours is not None:
        found.append(Limit("wall_hours", wall, budget.wall_hours, "hours"))
    if budget.device_hours is not None:
        found.append(Limit("device_hours", devices, budget.device_hours, "device-hours"))
    if budget.money is not None:
        found.append(Limit("money", money(price, used.held, used.wall_seconds), budget.money, price.currency))
    if budget.plateau_trials is not None:
        still = stagnation(used.growth, budget.plateau_growth)
        found.append(Limit("plateau_trials", still, budget.plateau_trials, "trials without growth"))
    return found


def money(price: Price, held: Mapping[str, float], wall_seconds: float) -> float:
    """Devices, each kind at its price, and the head node, in the currency of `price`.

    Args:
        price: of the study.
        held: device-seconds by kind of device.
        wall_seconds: of the head node.

    Raises:
        InputError: a device was held and has no price.
    """
    kinds = {price.device or kind for kind in held}
    if unknown := sorted(kinds - price.device_hour.keys()):
        known = ", ".join(price.device_hour) or "none"
        raise InputError(
            f"price.device_hour: no price for {' and '.join(map(repr, unknown))}, which trials run on; prices are for "
            f"{known}. Give --price.device-hour {unknown[0]}=PRICE, or name the kind by --price.device"
        )
    devices = sum(seconds * price.device_hour[price.device or kind] for kind, seconds in held.items())
    return (devices + wall_seconds * price.head_hour) / SECONDS_AN_HOUR


def known_money(price: Price, held: Mapping[str, float], wall_seconds: float) -> float | None:
    """As `money`; None where a price is not given."""
    if not price.device_hour:
        return None
    with suppress(InputError):
        return money(price, held, wall_seconds)
    return None


def stagnation(shares: Sequence[float], growth: float) -> int:
    """Over how many of the last complete trials the hypervolume share grew by no more than `growth`."""
    before = max(0, len(shares) - 1)  # they never fall
    return before - bisect_left(shares, True, hi=before, key=lambda earlier: shares[-1] - earlier <= growth)


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
