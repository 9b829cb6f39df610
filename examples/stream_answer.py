"""Ask about an image or a video and print the answer while it is written: `stream_answer.py QUESTION [MEDIUM ...]`.

Needs the base install only, and `KEYE_REDIS_URL` where Redis is not on this machine.
"""

import sys

from keye import Client, JobFailed, StageStarted, TextGenerated


def main(question: str, *media: str) -> None:
    with Client() as client:
        job = client.submit(prompt=question, media=media, generation={"max_new_tokens": 512})
        print(f"job {job.id}", file=sys.stderr)
        for event in job.events(timeout=600):
            if isinstance(event, StageStarted):
                # Of a job that is queued again, `reason` says why; the next attempt writes its text anew.
                print(f"[{event.reason or event.stage}, attempt {event.attempt}]", file=sys.stderr)
            elif isinstance(event, TextGenerated) and event.channel == "answer":
                print(event.text, end="", flush=True)
        print()
        try:
            print(f"[{job.result().usage.completion_tokens} tokens]", file=sys.stderr)
        except JobFailed as failed:
            sys.exit(str(failed))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
