"""What a check found, and how findings are told. Checks themselves live in `preflight` and `trials`."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich.markup import escape
from rich.table import Table

from keye.config.contract import escaped
from keye.config.terminal import visible


class Severity(StrEnum):
    """A fault stops a worker from starting, a warning does not."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


_COLOURS = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.FAULT: "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: what was found, and in one line what to do about it."""

    subject: str
    severity: Severity
    found: str
    cure: str = ""

    def __str__(self) -> str:
        # What was found may be another library's sentence, full stop and all.
        return escaped(f"{self.subject}: {self.found.rstrip('.')}. {self.cure}").rstrip()


def ok(subject: str, found: str) -> Finding:
    return Finding(subject, Severity.OK, found)


def warning(subject: str, found: str, cure: str) -> Finding:
    return Finding(subject, Severity.WARNING, found, cure)


def fault(subject: str, found: str, cure: str) -> Finding:
    return Finding(subject, Severity.FAULT, found, cure)


def select(findings: Sequence[Finding], severity: Severity) -> list[Finding]:
    return [finding for finding in findings if finding.severity is severity]


def as_message(findings: Sequence[Finding]) -> str:
    """Findings of one severity as one log record: how many, and one a line."""
    count = len(findings)
    lines = "".join(f"\n  - {finding}" for finding in findings)
    return f"preflight: {count} {findings[0].severity}{'s' if count > 1 else ''}:{lines}"


def as_rows(finding: Finding) -> Table:
    """For a terminal: what was found, and below it what to do."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(width=7)
    rows.add_column(width=18)
    rows.add_column(overflow="fold")
    rows.add_row(
        f"[{_COLOURS[finding.severity]}]{finding.severity}[/]", finding.subject, escape(visible(finding.found))
    )
    if finding.cure:
        rows.add_row("", "", f"[bold]{escape(visible(finding.cure))}[/]")
    return rows
