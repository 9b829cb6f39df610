"""What `keye watch` shows of a job's events: a line for each step, and the text as it comes. Prints nothing itself."""

from datetime import datetime

import typer

from keye.config.event import FramesDecoded, JobEnded, JobEvent, StageStarted, TextGenerated


class Transcript:
    """One job's events, in order, to text for a terminal. Reasoning is dim."""

    def __init__(self) -> None:
        self._channel: str | None = None
        self._shown: dict[str, int] = {}

    def show(self, event: JobEvent) -> str:
        match event:
            case TextGenerated():
                return self._show_text(event)
            case StageStarted(stage=stage, attempt=attempt):
                what = f"{stage} (attempt {attempt})"
            case FramesDecoded(media_index=index, done=done, total=total):
                what = f"medium {index}: {done} of {total} frames"
            case JobEnded(state=state):
                what = state.value
        end_of_text = "" if self._channel is None else "\n\n"
        # Text behind a stage is another attempt's.
        self._channel, self._shown = None, {}
        return f"{end_of_text}{datetime.fromtimestamp(event.at):%H:%M:%S}  {what}\n"

    def _show_text(self, event: TextGenerated) -> str:
        border = "\n" if self._channel is None else "" if self._channel == event.channel else "\n\n"
        shown = self._shown.get(event.channel, 0)
        gap = "[...]" if event.offset > shown else ""
        text = gap + event.text[max(0, shown - event.offset) :]
        self._channel = event.channel
        self._shown[event.channel] = event.offset + len(event.text)
        return border + typer.style(text, dim=event.channel == "reasoning")
