"""What the operator sees of a running worker; what libraries warn of too, and no warning ever ends a job."""

import warnings
from typing import Any, cast


def tell_warnings() -> None:
    """Let every warning that the filters would raise be told instead. Cheap: whoever begins some work may call it.

    PYTHONWARNINGS=error, which other parts of an operator's host may want, or a library's own `simplefilter("error")`
    would else turn a word about the next release into the failure of whatever job comes by.
    """
    filters = cast("list[tuple[Any, ...]]", warnings.filters)
    if any(action == "error" for action, *_ in filters):
        filters[:] = [("default" if action == "error" else action, *rest) for action, *rest in filters]
