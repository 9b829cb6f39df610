"""How a test fetches one medium, and what every fault of one that is not to be had holds to."""

import pytest

from keye.config.faults import Fault
from keye.config.job import ImagePart
from keye.worker.media.faults import name_medium
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch


def fetch_one(uri: str, limits: MediaLimits, media_cache: MediaCache) -> bytes:
    (fetched,) = fetch([ImagePart(uri=uri)], limits, media_cache)
    with fetched as file:
        return file.read()


def fault_of(uri: str, limits: MediaLimits, media_cache: MediaCache) -> Fault:
    with pytest.raises(Fault) as caught:
        fetch_one(uri, limits, media_cache)
    assert caught.value.media_index == 0
    assert caught.value.message.startswith(f"{name_medium(uri)}: ")
    assert "secret" not in caught.value.message
    assert limits.s3_endpoint_url is None or limits.s3_endpoint_url not in caught.value.message
    return caught.value
