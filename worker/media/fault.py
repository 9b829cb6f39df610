"""What can be wrong with a medium, told with the code the caller will read."""

from config.error_codes import ErrorCode


class MediaFault(Exception):
    """`message` is for the caller; it never holds query strings, signed URLs or credentials.

    `media_index` is the medium to blame, counted as in `AnalysisJob.all_media`; the front door fills it in.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.media_index: int | None = None
