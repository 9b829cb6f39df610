"""What a check found, and how findings are told. Checks themselves live in `preflight` and `trials`."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich.markup import escape
from rich.table import Table


class Severity(StrEnum):
    """A fault stops a worker from starting, a warning does not."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: what was found, and in one line what to do about it."""

    subject: str
    severity: Severity
    found: str
    cure: str = ""

    def __str__(self) -> str:
        # What was found may be another library's sentence, full stop and all.
        return f"{self.subject}: {self.found.rstrip('.')}. {self.cure}".rstrip()


def select(findings: Sequence[Finding], severity: Severity) -> list[Finding]:
    return [finding for finding in findings if finding.severity is severity]


def as_message(findings: Sequence[Finding]) -> str:
    """Findings of one severity as one log record: how many, and one a line."""
    count = len(findings)
    lines = "".join(f"\n  - {finding}" for finding in findings)
    return f"preflight: {count} {findings[0].severity}{'s' if count > 1 else ''}:{lines}"


def as_table(findings: Sequence[Finding]) -> Table:
    colours = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.FAULT: "red"}
    table = Table("", "checked", title="keye-worker doctor")
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for finding in findings:
        colour = colours[finding.severity]
        table.add_row(f"[{colour}]{finding.severity}[/]", finding.subject, escape(finding.found), escape(finding.cure))
    return table
