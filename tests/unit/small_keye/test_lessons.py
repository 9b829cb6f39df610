"""What the tower is told that it sees must be what is painted there."""

from pathlib import Path

import numpy as np
import pytest

from keye.worker.demo.shapes import BACKGROUNDS, RGB_OF
from keye.worker.model.image_processing import ImageProcessor
from tools.small_keye.checkpoint_folder import write_folder
from tools.small_keye.lessons import IGNORED, NUM_PLACES, NUM_SHAPE_SIGHTS, Lesson, Teacher
from tools.small_keye.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder: Path = tmp_path_factory.mktemp("folder")
    write_folder(folder, train_tokenizer())
    return Teacher(ImageProcessor.from_checkpoint(folder), {"count": 50.0})


@pytest.mark.parametrize("draw", ["image_lesson", "video_lesson"])
def test_plain_tokens_have_the_colour_of_the_background(teacher: Teacher, draw: str) -> None:
    for seed in range(20):
        lesson: Lesson = getattr(teacher, draw)(np.random.default_rng(seed))
        (item,) = lesson.items
        frames, rows, columns = item.grid
        patches = item.pixel_values.view(frames, rows // 2, 2, columns // 2, 2, 3, -1).movedim(3, 2)
        colours = patches.float().mean(dim=(3, 4, 6)).flatten(0, 2).numpy()
        for sight, place, colour in zip(item.sights.tolist(), item.places.tolist(), colours, strict=True):
            if sight >= NUM_SHAPE_SIGHTS:
                nearest = min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(colour - np.array(RGB_OF[name]))))
                assert BACKGROUNDS[sight - NUM_SHAPE_SIGHTS] == nearest
                assert place == [IGNORED, IGNORED]


def test_the_places_of_a_moving_shape_move_with_it(teacher: Teacher) -> None:
    moved = 0
    for seed in range(40):
        lesson = teacher.video_lesson(np.random.default_rng(seed))
        answers = {question.answer for question, _ in lesson.asks if question.kind == "which way"}
        (item,) = lesson.items
        shown = item.places[item.sights < NUM_SHAPE_SIGHTS].tolist()
        first, last = shown[0], shown[-1]
        assert all(0 <= place < NUM_PLACES for place in (*first, *last))
        if answers == {"To the right."}:
            assert last[0] > first[0]
            moved += 1
        if answers == {"Up."}:
            assert last[1] < first[1]
            moved += 1
    assert moved > 3


def test_kinds_of_questions_are_asked_as_often_as_their_share_says(teacher: Teacher) -> None:
    lessons = [teacher.image_lesson(np.random.default_rng(seed)) for seed in range(20)]
    assert all({"count"} <= {question.kind for question, _ in lesson.asks} for lesson in lessons)
