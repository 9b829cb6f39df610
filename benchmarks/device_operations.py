"""What a GPU is asked to do in a step at the real 8B sizes, counted on a pretended one: no GPU and no memory needed."""

from dataclasses import replace

import torch

from benchmarks.pretended_cuda import PretendedCuda, Tally, pretended_cuda
from benchmarks.synthetic_keye import NUM_TEXT_TOKENS, make_model, make_processor, make_prompt, real_size
from keye.worker.daemon.bench import anew
from keye.worker.engine.inbox import PendingGeneration, SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.processor import PreparedPrompt

NUM_JOBS = 64
_GREEDY = SamplingOptions(1000)
_SAMPLED = replace(_GREEDY, temperature=0.6, top_p=0.95, top_k=20, seed=7)
_PENALISED = replace(_SAMPLED, repetition_penalty=1.05)


def run() -> str:
    size = replace(real_size(), limits=StepLimits(NUM_JOBS, 2048))
    picture, words = make_prompt(size, seed=0), _words(NUM_TEXT_TOKENS)
    with pretended_cuda() as cuda:
        model = make_model(size, torch.device("cuda"))
        engine = Engine(model, make_processor(size), kv_cache_bytes=50 * 2**30, limits=size.limits)
        # One width of table: what is in a graph is the same for all of them.
        engine._runner._attention.table_widths = engine._runner._attention.table_widths[:1]
        engine._runner.capture_decoding(NUM_JOBS)
        lines = [
            f"{NUM_JOBS} jobs decode; an image comes to {picture.num_visual_tokens} tokens, the text beside it to"
            f" {NUM_TEXT_TOKENS}.",
            "",
            "| | operations | copies to the device | waits, blocking copies among them |",
            "|---|---|---|---|",
            _row("in the graph of a decoding step", cuda.recordings[0]),
        ]
        for name, options in (("greedy", _GREEDY), ("sampled", _SAMPLED), ("with a repetition penalty", _PENALISED)):
            pendings = [engine.inbox.submit(anew(words), options) for _ in range(NUM_JOBS)]
            _step_until_decoding(engine)
            engine._step()
            lines.append(_row(f"around it, {name}", _count_step(engine, cuda)))
            pendings[0].abandon()
            lines.append(_row(f"around it, {name}, as one job leaves", _count_step(engine, cuda)))
            _abandon(engine, pendings[1:])
        pendings = [engine.inbox.submit(picture, _GREEDY)]
        lines.append(_row("a step that reads an image and its prompt", _count_step(engine, cuda)))
        pendings += [engine.inbox.submit(anew(words), _GREEDY) for _ in range(NUM_JOBS - 2)]
        _step_until_decoding(engine)
        pendings.append(engine.inbox.submit(anew(_words(picture.num_visual_tokens)), _GREEDY))
        lines.append(_row("a step that reads a text while others decode", _count_step(engine, cuda)))
        _abandon(engine, pendings)
    return "\n".join(lines) + "\n"


def _count_step(engine: Engine, cuda: PretendedCuda) -> Tally:
    with cuda.counting() as tally:
        engine._step()
    return tally


def _step_until_decoding(engine: Engine) -> None:
    engine._step()
    while not all(sequence.is_decoding for sequence in engine._scheduler):
        engine._step()


def _abandon(engine: Engine, pendings: list[PendingGeneration]) -> None:
    for pending in pendings:
        # A job that a step has failed would make the counts wrong, and be one of the engine's faults.
        assert not pending.has_ended
        pending.abandon()
    engine._step()


def _words(num: int) -> PreparedPrompt:
    return PreparedPrompt("", torch.arange(num) % 400, torch.arange(num).expand(3, -1), 0, 0)


def _row(name: str, tally: Tally) -> str:
    return f"| {name} | {tally.num_operations} | {len(tally.copies)} | {len(tally.waits)} |"
