"""docs/from-a-script.md and README's first lines: run as they are printed, with the small model on the CPU."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from keye import Analyzer
from keye.producer import Client, InvalidJob, InvalidSettings, JobFailed
from keye.worker.demo.errands import draw_errands
from tests.acceptance.conftest import ECHO, Start
from tests.support.checkout import PYTHONPATH, ROOT
from tests.support.pages import printed

PAGE = "docs/from-a-script.md"
PRINTED_PATH, CHECKPOINT = "/srv/models/Keye-VL-8B-Preview", str(ROOT / "worker/demo/checkpoint")


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What is to be seen in photo.jpg and in clip.mp4, in the working directory of a script."""
    errands = draw_errands(tmp_path, lambda path: f"s3://demo/{path.name}")
    (tmp_path / "shapes.jpg").rename(tmp_path / "photo.jpg")
    (tmp_path / "moving.mp4").rename(tmp_path / "clip.mp4")
    for name in ("CACHE", "SPOOL", "RUN"):
        monkeypatch.setenv(f"KEYE_{name}_FOLDER", str(tmp_path / name.lower()))
    monkeypatch.setenv("KEYE_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    caption, way = (next(e.expected for e in errands if e.label == name) for name in ("shapes.jpg", "moving.mp4"))
    return str(caption), f"moves {str(way).lower()}"


@pytest.mark.holds("README.md#from-a-script", "without Redis", "from keye import Analyzer", "keye-worker ask photo.jpg")
def test_three_lines_and_one_of_a_shell_answer(shown: tuple[str, str]) -> None:
    (program,) = printed("README.md", "From a script")
    assert len(list(filter(None, program.splitlines()))) == 3
    (command,) = printed("README.md", "From a script", "")
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": PYTHONPATH}
    # Nobody listens there.
    own |= {"KEYE_REDIS_URL": "redis://127.0.0.1:1/0"}
    environ = {name: value for name, value in os.environ.items() if name != "KEYE_MODEL_PATH"} | own
    told = [
        subprocess.run(line, env=environ, input=stdin, capture_output=True, text=True, timeout=120, check=True)
        for line, stdin in [
            ([sys.executable, "-"], program.replace(PRINTED_PATH, CHECKPOINT)),
            (["bash", "-c", command], None),
        ]
    ]
    assert [each.stdout.strip() for each in told] == [shown[0]] * 2, told
    assert "drawn shapes" in told[1].stderr


@pytest.mark.holds(
    "docs/from-a-script.md#what-becomes-of-my-transformers-script",
    "there is no flash-attn to compile",
)
def test_nothing_is_compiled_or_installed_beside_it() -> None:
    needed = {need.name for need in map(Requirement, requires("keye-worker") or []) if "worker" in str(need.marker)}
    assert {"torch", "av"} <= needed
    assert not needed & {"flash-attn", "decord", "torchcodec"}


@pytest.mark.holds("docs/from-a-script.md#what-becomes-of-my-transformers-script", "from keye import Analyzer")
@pytest.mark.holds("docs/from-a-script.md#a-video", "result = analyzer.video(")
@pytest.mark.holds("docs/from-a-script.md#many-pictures", "for end in analyzer.batch(")
@pytest.mark.holds("docs/from-a-script.md#while-it-is-written", "for piece in analyzer.stream(")
@pytest.mark.holds("docs/from-a-script.md#pixels-precision-memory", "min_pixels=256 * 28 * 28", "A token is 28 x 28")
@pytest.mark.holds("docs/from-a-script.md#from-a-script-to-a-fleet", "def describe(", "async def describe_all(")
def test_every_block_of_the_page_runs(
    shown: tuple[str, str],
    start: Start,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KEYE_REDIS_URL", redis_url)
    start(*ECHO)
    names: dict[str, Any] = {}
    told = []
    for block in printed(PAGE):
        exec(block.replace(PRINTED_PATH, CHECKPOINT), names)
        told.append(capsys.readouterr().out)
    caption, happens = shown
    asked, video, batch, stream, pixels, fleet, from_asyncio = told
    assert asked.startswith(caption)
    assert "background" in asked
    assert [happens in line for line in video.splitlines()] == [True, True]
    assert video.splitlines()[0].endswith(" 10.0")
    first, lost, last = batch.splitlines()
    assert first == last == caption
    assert lost.startswith("no answer: ")
    assert "lost.jpg" in lost
    assert stream == caption
    assert pixels == "(448, 448) 256 float32\n"
    assert fleet.splitlines() == [caption, "What is in the image?"]
    assert from_asyncio.strip() == str([caption] * 2)


@pytest.fixture(scope="module")
def analyzer() -> Iterator[Analyzer]:
    with Analyzer(CHECKPOINT, device="cpu") as analyzer:
        yield analyzer


@pytest.mark.holds("docs/from-a-script.md#what-becomes-of-my-transformers-script", "in the script | here")
def test_each_piece_of_a_script_has_its_place(analyzer: Analyzer, shown: tuple[str, str]) -> None:
    picture = Image.open("photo.jpg")
    question = "What is in the image?"
    for given in (Path("photo.jpg"), picture, Path("photo.jpg").read_bytes(), np.asarray(picture), [picture]):
        assert analyzer.analyze(given, question).answer == shown[0]
    thought = [analyzer.analyze(picture, question, thinking_mode=mode).reasoning for mode in ("think", "no_think")]
    assert [bool(text) for text in thought] == [True, False]
    with pytest.raises(JobFailed, match="MEDIA_NOT_FOUND"):
        analyzer.analyze("/lost.jpg", question)
    (lost,) = analyzer.batch(["/lost.jpg"], question)
    assert str(lost).startswith("MEDIA_NOT_FOUND: /lost.jpg")
    with pytest.raises(InvalidJob):
        analyzer.analyze(picture, "")


@pytest.mark.holds("docs/from-a-script.md#a-video", "`content` is the rate by what is shown")
def test_what_is_shown_decides_the_rate(analyzer: Analyzer, shown: tuple[str, str]) -> None:
    for content, least, most in [("action", 15, 30), ("static", 1, 5), ("dialogue", 5, 10), ("hd", 10, 15)]:
        seen = analyzer.video("clip.mp4", "Describe the video.", content=content, max_new_tokens=1).media[0]
        assert least <= (seen.fps_asked or seen.fps or 0) <= most, seen


@pytest.mark.holds("docs/from-a-script.md#the-names-you-know", "in the script | here", "refuse a name of the others")
@pytest.mark.holds("docs/from-a-script.md#the-names-you-know", "A job refuses all of them so.")
def test_the_names_that_people_know_are_understood_or_refused_with_what_to_write(
    analyzer: Analyzer, shown: tuple[str, str]
) -> None:
    section = (ROOT / PAGE).read_text().split("## The names you know\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)[1:]
    rows = [(re.findall(r"`(\w+)", names), re.findall(r"`(\w+)", here)) for names, here in table]
    understood = {name for names, _ in rows[:4] for name in names}
    options = dict.fromkeys(understood, 1) | {"do_sample": False, "thinking_mode": "think"}
    options |= {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    assert analyzer.video("clip.mp4", "?", **options).media[0].resized_size == (56, 56)
    client = Client("redis://127.0.0.1:1/0")
    for names, instead in rows:
        for name in names:
            doors: list[Callable[..., object]] = [partial(client.submit, prompt="?")]
            if name not in understood:
                doors.append(partial(analyzer.analyze, "photo.jpg", "?"))
                doors += [] if "max_frames" in instead else [partial(Analyzer, CHECKPOINT)]
            for door in doors:
                with pytest.raises((InvalidJob, InvalidSettings)) as refused:
                    door(**{name: True})
                sentence = str(refused.value)
                assert not sentence.endswith(("is no field here", "is no setting"))
                assert all(word in sentence for word in instead[:1]), sentence


def loaded_today(folder: Path, **options: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    Qwen3ForCausalLM(Qwen3Config(num_attention_heads=2, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.holds("docs/from-a-script.md#what-do-old-scripts-get-wrong-today", "in the script | what happens")
def test_transformers_of_today_does_with_old_options_what_the_page_says(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="load_in_8bit"):
        loaded_today(tmp_path, load_in_8bit=True)
    with pytest.raises(ImportError, match="FlashAttention2"):
        loaded_today(tmp_path, attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    model, prompt = loaded_today(tmp_path), torch.tensor([[1, 2, 3]])
    drawn = [model.generate(prompt, max_new_tokens=8, temperature=2.0).tolist() for _ in range(4)]
    assert drawn == [model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()] * 4
