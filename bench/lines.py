"""One line of the speed table, and what it can say."""

from dataclasses import dataclass

PASS, SHORT, WRONG, NONE = "PASS", "short", "WRONG", "not measured"


@dataclass
class Line:
    """One line of the speed table. ``value`` is what ``limit`` is compared with."""

    what: str
    must: str
    measured: str
    verdict: str
    value: float | None = None
    limit: float | None = None


def at_least(what, limit, value, unit="", note=""):
    verdict = PASS if value >= limit else SHORT
    return Line(what, f"≥ {limit:.4g}{unit}", f"{value:.4g}{unit}{note}", verdict, value, limit)


def at_most(what, limit, value, unit="", note=""):
    verdict = PASS if value <= limit else SHORT
    return Line(what, f"≤ {limit:.4g}{unit}", f"{value:.4g}{unit}{note}", verdict, value, limit)


def not_measured(what, must, reason):
    return Line(what, must, reason, NONE)


def wrong(what, worst):
    return Line(what, "a right result", f"largest error {worst:.2g} of the largest value", WRONG)
