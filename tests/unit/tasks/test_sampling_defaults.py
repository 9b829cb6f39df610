"""A job's sampling options, completed by the checkpoint's."""

import json
from pathlib import Path
from typing import Any

from keye.config.job import GenerationOptions
from keye.worker.tasks.sampling import complete_sampling, load_sampling


def defaults_of(folder: Path, **written: object) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(written))
    return load_sampling(folder)


def test_options_left_out_are_the_checkpoints(tmp_path: Path) -> None:
    defaults = defaults_of(tmp_path, do_sample=True, temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05)
    (sampling,) = complete_sampling(GenerationOptions(), defaults)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.6, 0.95, 20, 1.05)
    assert sampling.max_new_tokens == 1024


def test_options_of_the_job_win_even_when_they_are_zero(tmp_path: Path) -> None:
    defaults = defaults_of(tmp_path, do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    options = GenerationOptions(temperature=0, top_k=0, top_p=0.5, stop=(".",), seed=3)
    (sampling,) = complete_sampling(options, defaults)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert (sampling.stop, sampling.seed) == ((".",), 3)


def test_checkpoint_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    assert defaults_of(tmp_path, do_sample=False, temperature=0.6)["temperature"] == 0
    assert defaults_of(tmp_path, eos_token_id=1)["temperature"] == 0
