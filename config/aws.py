"""The `AWS_*` names of the `.env` that settings come from, put where boto3 looks: in the environment only."""

import os

from keye.config.settings import read_env_file

# Who asks. These belong together: a key of one place with the token of another opens nothing.
_IDENTITY = frozenset(
    f"AWS_{name}"
    for name in (
        *("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "DEFAULT_PROFILE"),
        *("ROLE_ARN", "WEB_IDENTITY_TOKEN_FILE"),
        *("CONTAINER_CREDENTIALS_RELATIVE_URI", "CONTAINER_CREDENTIALS_FULL_URI"),
    )
)


def load_aws_names() -> None:
    """Put what `.env` has and the environment has not into the environment of this process.

    Of keys, token, profile and role nothing is taken where the environment has any. An empty value is none: compose
    files write them.
    """
    given = {name: value for name, value in read_env_file().items() if name.startswith("AWS_") and value}
    if any(map(os.environ.get, _IDENTITY)):
        given = {name: value for name, value in given.items() if name not in _IDENTITY}
    os.environ.update({name: value for name, value in given.items() if not os.environ.get(name)})
