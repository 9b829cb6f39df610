"""Scenes must show what their answers say: a wrong answer here would be learnt, demonstrated and tested."""

import numpy as np
import pytest

from keye.worker.demo.questions import CELLS, ORDINALS
from keye.worker.demo.scenes import IMAGE_SIZE, draw_image_scene, draw_images, draw_video_scene
from keye.worker.demo.shapes import BACKGROUNDS, COLOURS, RGB_OF

SEEDS = range(200)


def nearest_name(pixel: np.ndarray, names: tuple[str, ...]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(pixel - np.array(RGB_OF[name], float))))


def pixel_at(image: np.ndarray, centre: tuple[float, float]) -> np.ndarray:
    height, width = image.shape[:2]
    return image[int(centre[1] * height), int(centre[0] * width)].astype(float)


def centre_of_shape(frame: np.ndarray) -> tuple[float, float]:
    is_shape = np.linalg.norm(frame.astype(float) - frame[0, 0], axis=-1) > 60
    rows, columns = np.nonzero(is_shape)
    return columns.mean(), rows.mean()


def test_one_seed_always_draws_the_same_scene() -> None:
    first, second = (draw_image_scene(np.random.default_rng(3)) for _ in range(2))
    assert first == second
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    moving, again = (draw_video_scene(np.random.default_rng(3)) for _ in range(2))
    assert moving == again
    assert np.array_equal(moving.frames(), again.frames())


@pytest.mark.parametrize("size", [(112, 112), (84, 112), (224, 168)])
def test_the_size_changes_how_a_scene_is_painted_but_not_what_is_asked(size: tuple[int, int]) -> None:
    scene = draw_image_scene(np.random.default_rng(5), size)
    assert scene.image.size == size
    assert scene.questions == draw_image_scene(np.random.default_rng(5)).questions


def test_shapes_are_painted_in_the_colour_and_cell_the_answers_name() -> None:
    for seed in SEEDS:
        scene = draw_image_scene(np.random.default_rng(seed))
        pixels = np.asarray(scene.image)
        for cell, shape in scene.shapes:
            assert nearest_name(pixel_at(pixels, shape.centre), (*COLOURS, *BACKGROUNDS)) == shape.colour
            row, column = int(shape.centre[1] * 2), int(shape.centre[0] * 3)
            assert CELLS[row * 3 + column] == cell
        for question in scene.questions:
            if question.kind == "where" and question.language == "en":
                cells = [cell for cell, s in scene.shapes if f"the {s.colour} {s.kind}?" in question.text]
                assert [question.answer] == [f"At the {cell}." for cell in cells]


def test_the_background_is_the_one_answered() -> None:
    for seed in SEEDS:
        scene = draw_image_scene(np.random.default_rng(seed))
        answer = next(q.answer for q in scene.questions if q.kind == "background" and q.language == "en")
        assert nearest_name(pixel_at(np.asarray(scene.image), (0.0, 0.0)), BACKGROUNDS) == answer.lower().strip(".")


def test_yes_and_no_are_both_asked_for_and_true() -> None:
    for seed in SEEDS:
        scene = draw_image_scene(np.random.default_rng(seed))
        asked = [q for q in scene.questions if q.kind == "is there"]
        assert [q.answer for q in asked] == ["Yes.", "No."]
        for question in asked:
            is_there = any(f" {shape.colour} shape" in question.text for _, shape in scene.shapes)
            assert question.answer == ("Yes." if is_there else "No.")


def test_what_is_asked_by_its_place_is_what_stands_there() -> None:
    for seed in SEEDS:
        scene = draw_image_scene(np.random.default_rng(seed))
        shapes = dict(scene.shapes)
        for question in scene.questions:
            if question.language == "zh" or question.kind not in ("what is at", "colour"):
                continue
            shape = shapes.get(next(cell for cell in CELLS if question.text.endswith(f"at the {cell}?")))
            if shape is None:
                assert question.answer == "Nothing."
            else:
                assert shape.colour in question.answer.lower()
                assert shape.kind in question.answer or question.kind == "colour"


def test_several_images_are_told_apart_by_their_number() -> None:
    for seed in SEEDS:
        scenes, questions = draw_images(np.random.default_rng(seed), [IMAGE_SIZE] * 3)
        for question in questions:
            number = next(i for i, ordinal in enumerate(ORDINALS) if ordinal in question.text)
            shape = scenes[number].shapes[0][1]
            assert shape.colour in question.answer.lower() or shape.kind in question.answer


@pytest.mark.parametrize("fps", [2.0, 10.0])
def test_a_moving_shape_moves_the_way_the_answer_says(fps: float) -> None:
    ways = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
    scenes = [draw_video_scene(np.random.default_rng(seed)) for seed in range(60)]
    moving = [scene for scene in scenes if scene.event in ways]
    assert len({scene.event for scene in moving}) == 4
    for scene in moving:
        frames = scene.frames(fps)
        assert len(frames) == scene.seconds * fps
        axis, sign = ways[scene.event]
        first, last = centre_of_shape(frames[0]), centre_of_shape(frames[-1])
        along, across = last[axis] - first[axis], last[1 - axis] - first[1 - axis]
        assert along * sign > 10
        assert abs(across) < abs(along) / 2


def test_a_changing_shape_ends_in_the_colour_the_answer_says_and_stays_where_it_is() -> None:
    scenes = [draw_video_scene(np.random.default_rng(seed)) for seed in range(60)]
    changing = [scene for scene in scenes if scene.event in COLOURS]
    assert changing
    for scene in changing:
        frames = scene.frames()
        first, last = (nearest_name(pixel_at(frame, scene.shape.centre), COLOURS) for frame in (frames[0], frames[-1]))
        assert (first, last) == (scene.shape.colour, scene.event)
        become = next(q for q in scene.questions if q.kind == "becomes" and q.language == "en")
        assert become.answer == f"{last.capitalize()}."


def test_every_thinking_mode_has_its_form() -> None:
    questions = draw_image_scene(np.random.default_rng(1)).questions
    for question in questions:
        thought = f"<think>{question.sight}</think><answer>{question.answer}</answer>"
        assert question.reply("no_think") == question.answer
        assert question.reply("think") == thought
        analysis, _, rest = question.reply("auto").partition("</analysis>")
        assert analysis.startswith("<analysis>")
        assert rest == (thought if analysis.endswith(("/think.", "/think。")) else question.answer)
    assert {question.reply("auto").endswith("</answer>") for question in questions} == {True, False}
