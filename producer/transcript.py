"""What is shown of a job: a line for each step, the text as it comes, and its answers."""

import time
from datetime import datetime

import typer

from keye.config.codes import JobState
from keye.config.contract import escaped
from keye.config.event import AnswerEnded, EventsMissing, FramesDecoded, JobEnded, JobEvent, StageStarted, TextGenerated
from keye.config.outcome import JobResult, Unanswered
from keye.config.terminal import visible
from keye.producer.progress import Progress
from keye.producer.shell import ExitCode, tell


def tell_answers(result: JobResult, is_first_told: bool = False) -> None:
    """The answer; each of several, by its number."""
    if not result.answers and not is_first_told:
        tell(result.answer)
    are_samples = any(each.sample for each in result.answers)
    for each in result.answers:
        name = f"question {each.question + 1}" + (f", sample {each.sample + 1}" if are_samples else "")
        if isinstance(each, Unanswered):
            tell(escaped(f"{name}: {each.code}: {each.message}"), err=True)
        elif not (is_first_told and each.question == each.sample == 0):
            tell(f"{name}: {each.answer}")


def end_if_unanswered(result: JobResult) -> None:
    """With the code of a job without an answer, where one of several could not be given."""
    if any(isinstance(each, Unanswered) for each in result.answers):
        raise typer.Exit(ExitCode.JOB_FAILED)


class Transcript:
    """One job's events, in order, to text whose only control characters are its styles: all but the answer is dim.

    Of several answers, which are written side by side, only the first is shown as it comes.
    """

    def __init__(self) -> None:
        self._channel: str | None = None
        self._shown: dict[str, int] = {}
        self._place: tuple[int | None, bool] | None = None
        self.has_gaps = False

    def place(self, progress: Progress) -> str:
        """A line where the job waits, once and whenever it has moved; else nothing."""
        place = (progress.place, progress.has_worker) if progress.state is JobState.QUEUED else None
        if place is None or place == self._place:
            return ""
        self._place = place
        what = "queued" if progress.place is None else f"queued, {progress.place} before it"
        if not progress.has_worker:
            what += "; no worker is ready"
        elif progress.seconds_left is not None:
            what += f", done in about {progress.seconds_left:.0f} s"
        return self._line(time.time(), what)

    def show(self, event: JobEvent | EventsMissing) -> str:
        match event:
            case EventsMissing(num_missing=number):
                self.has_gaps = True
                what = f"{'some' if number is None else number} events are missing: the stream keeps the newest"
            case TextGenerated(question=0, sample=0):
                return self._show_text(event)
            case TextGenerated() | AnswerEnded():
                return ""
            case StageStarted(stage=stage, attempt=attempt, reason=reason):
                why = "" if reason is None else f", {reason.replace('_', ' ')}"
                what = f"{stage} (attempt {attempt}{why})"
            case FramesDecoded(media_index=index, done=done, total=total):
                what = f"medium {index}: {done} of {total} frames"
            case JobEnded(state=state):
                what = state.value
        return self._line(event.at, what)

    def _line(self, at: float, what: str) -> str:
        end_of_text = "" if self._channel is None else "\n\n"
        # Text behind a stage is another attempt's.
        self._channel, self._shown = None, {}
        return f"{end_of_text}{datetime.fromtimestamp(at):%H:%M:%S}  {escaped(what)}\n"

    def _show_text(self, event: TextGenerated) -> str:
        border = "\n" if self._channel is None else "" if self._channel == event.channel else "\n\n"
        shown = self._shown.get(event.channel, 0)
        gap = "[...]" if event.offset > shown else ""
        self.has_gaps |= bool(gap)
        text = gap + event.text[max(0, shown - event.offset) :]
        self._channel = event.channel
        self._shown[event.channel] = event.offset + len(event.text)
        return border + typer.style(visible(text), dim=event.channel != "answer")
