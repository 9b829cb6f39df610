"""Text as a job may hold it."""

from typing import Annotated

from pydantic import AfterValidator, Field


def is_whole(text: str) -> str:
    """Raises `ValueError` where it is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return text


# Python's `str` may hold what neither JSON nor Redis can. No type of pydantic's: the schema is the same without.
Text = Annotated[str, AfterValidator(is_whole)]
SomeText = Annotated[str, Field(min_length=1), AfterValidator(is_whole)]
