"""What every job needs of its host, tried once: a file in the cache, a picture decoded, a token generated."""

import time

from keye.config.job import ImagePart, Thinking
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.media.job_media import decode, fetch
from keye.worker.tasks.workbench import Workbench

# Of a worker whose jobs fill its decoders and its engine it does not show more.
PROBE_SECONDS = 5.0

# A grey square of 64 by 64 pixels.
PICTURE = ImagePart(
    uri="data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAK0lEQVR42u3MMREAAAgEoNfkRjeEmwcBqMlNRyAQCAQCgUAgEAgEAsHzYAFAdAEArKmlZAAAAABJRU5ErkJggg=="
)


class _TakesLong(Exception):
    pass


def probe(bench: Workbench) -> bool:
    """False where jobs kept it waiting. Raises what it met: a `HostFault`, an `OSError`, or what else a job would."""
    ends_at = time.monotonic() + PROBE_SECONDS

    def check() -> None:
        if time.monotonic() >= ends_at:
            raise _TakesLong

    bench.media_limits.media_roots.check()
    bench.media_cache.prove()
    try:
        sizing = bench.processor.sizing
        files = fetch([PICTURE], bench.media_limits, bench.media_cache, check)
        decode([PICTURE], files, bench.media_limits, sizing, bench.decoders, check=check)
    except _TakesLong:
        return False
    messages = [{"role": "user", "content": [{"type": "text", "text": "1"}]}]
    prompt = bench.processor.prepare(messages, [], [], Thinking.AUTO.value)
    pending = bench.inbox.submit(prompt, SamplingOptions(max_new_tokens=1), deadline=ends_at)
    for _ in pending.deltas():
        pass
    return pending.has_ended and pending.generated.finish_reason in ("stop", "length")
