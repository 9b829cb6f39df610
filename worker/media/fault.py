"""What can be wrong with a medium, told with the code the caller will read."""

from keye.config.outcome import ErrorCode


class MediaFault(Exception):
    """`message` is for the caller; it never holds query strings, signed URLs or credentials.

    `media_index` is the medium to blame, counted as in `AnalysisJob.all_media`; the front door fills it in.
    `retry_after_seconds` is how long the store asked to be left alone.
    """

    def __init__(self, code: ErrorCode, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.media_index: int | None = None
