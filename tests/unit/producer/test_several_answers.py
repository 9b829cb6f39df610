"""Jobs of several questions and samples, and answers that fit a schema, as whoever asks sees them."""

import json
from pathlib import Path
from typing import Any

import pytest

from keye import AnswerEnded, ErrorCode, InvalidBatch, InvalidJob, JobFailed, TextGenerated
from keye.config.job import AnalysisJob
from keye.producer.batch.lines import read_fields
from keye.producer.dead_cli import describe_job
from keye.producer.least_tokens import least_tokens
from keye.producer.replay import differences, seeded
from keye.producer.transport import MAX_PROGRESS_EVENTS
from keye.testing import MemoryClient

COLOUR = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
TWO: dict[str, Any] = {"media": "/a.mp4", "questions": ["What is it?", {"prompt": "Why?", "generation": {"n": 2}}]}


def told(result: Any) -> list[tuple[int, int, str]]:
    return [(each.question, each.sample, getattr(each, "answer", None) or each.code) for each in result.answers]


class TestTheClientForTests:
    def test_each_answer_is_as_the_test_says_and_one_text_is_that_of_all(self) -> None:
        client = MemoryClient(lambda job: ["a cat", ErrorCode.PROMPT_TOO_LONG, "it sleeps"])
        result = client.submit(**TWO).result(1)
        assert told(result) == [(0, 0, "a cat"), (1, 0, "PROMPT_TOO_LONG"), (1, 1, "it sleeps")]
        assert (result.answer, result.usage.completion_tokens) == ("a cat", 4)
        assert told(MemoryClient(lambda job: "?").submit(**TWO).result(1)) == [(0, 0, "?"), (1, 0, "?"), (1, 1, "?")]

    def test_the_first_that_was_given_stands_for_all_and_none_is_a_failure(self) -> None:
        codes = [ErrorCode.PROMPT_TOO_LONG, ErrorCode.OUT_OF_MEMORY]
        client = MemoryClient()
        job = client.submit(prompt="?", generation={"n": 2})
        client.answer(job, [codes[0], "second"])
        assert job.result(0).answer == "second"
        job = client.submit(prompt="?", generation={"n": 2})
        client.answer(job, codes)
        with pytest.raises(JobFailed, match="PROMPT_TOO_LONG"):
            job.result(0)

    def test_their_texts_come_side_by_side_and_each_tells_its_end(self) -> None:
        client = MemoryClient()
        job = client.submit(**TWO)
        client.start(job)
        for text in ("a ", "cat"):
            client.write(job, text)
            client.write(job, text.upper(), question=1, sample=1)
        assert job.progress.num_tokens == 4
        for _ in range(MAX_PROGRESS_EVENTS):
            client.write(job, "")
        assert job.progress.num_tokens == 4
        client.answer(job, ["-", "it sleeps", "-"])
        events = list(job.events(1))
        texts = [each for each in events if isinstance(each, TextGenerated)]
        assert [each.offset for each in texts if (each.question, each.sample) == (1, 1)] == [0, 2]
        assert told(job.result(0)) == [(0, 0, "a cat"), (1, 0, "it sleeps"), (1, 1, "A CAT")]
        ends = [each for each in events if isinstance(each, AnswerEnded)]
        assert [(each.question, each.sample, each.code) for each in ends] == [(0, 0, None), (1, 0, None), (1, 1, None)]

    def test_more_or_fewer_answers_than_were_asked_for_are_the_tests_mistake(self) -> None:
        client = MemoryClient()
        with pytest.raises(ValueError, match="2 answers for a job that asks for 3"):
            client.answer(client.submit(**TWO), ["a", "b"])

    def test_what_fits_a_schema_is_read(self) -> None:
        client = MemoryClient(lambda job: '{"colour": "红色"}' if isinstance(job.response_schema, dict) else "red")
        assert client.submit(prompt="?", response_schema=COLOUR).result(1).parsed == {"colour": "红色"}
        assert client.submit(prompt="?", response_schema=["red", "blue"]).result(1).parsed == "red"
        assert client.submit(prompt="?", response_schema="[a-z]+").result(1).parsed == "red"
        assert client.submit(prompt="?").result(1).parsed is None
        with pytest.raises(ValueError, match="'a cat' is no JSON"):
            MemoryClient(lambda job: "a cat").submit(prompt="?", response_schema=COLOUR)

    def test_logprobs_are_told_where_they_are_asked_for(self) -> None:
        client = MemoryClient(lambda job: " a red cat ")
        logprobs = client.submit(prompt="?", generation={"logprobs": True}).result(1).logprobs
        assert logprobs is not None
        assert "".join(each.token for each in logprobs) == " a red cat "
        assert client.submit(prompt="?").result(1).logprobs is None


class TestOtherReaders:
    def test_the_least_tokens_are_those_of_the_longest_question(self) -> None:
        alone = AnalysisJob(media=[{"type": "image", "uri": "/a"}], prompt="one two three")
        several = AnalysisJob(media=alone.media, questions=["one", "one two three", "one two"])
        assert least_tokens(several) == least_tokens(alone)
        longer = AnalysisJob(prompt="?", questions=(), generation={"max_new_tokens": 7})
        assert least_tokens(longer) == 8
        own = AnalysisJob(questions=[{"prompt": "?", "generation": {"max_new_tokens": 9000}}])
        assert least_tokens(own) == 9001

    def test_a_dead_letter_tells_all_questions(self) -> None:
        class Letter:
            job = AnalysisJob(media=[{"type": "image", "uri": "/a"}], questions=["What?", "为什么?"])

        assert describe_job(Letter()) == '"What?" "为什么?" /a'  # type: ignore[arg-type]

    def test_a_replay_has_the_seed_of_each_question_and_tells_what_each_came_to(self) -> None:
        questions = ["What?", {"prompt": "Why?", "generation": {"temperature": 1, "seed": 5, "n": 2}}]
        said = iter(["same", ["same", "same", "other"]])
        client = MemoryClient(lambda job: next(said))
        job = client.submit(questions=questions)
        replayed = client.replay(job.id)
        own = [each.generation.seed for each in client.asked(replayed).by_question()]
        assert own == [answer.generation.seed for answer in job.result(0).answers[:2]]  # type: ignore[union-attr]
        assert [each.what for each in differences(job.result(0), replayed.result(0))] == ["answers[2].raw_text"]

    def test_a_replay_has_the_seed_of_a_first_sample_that_was_not_given(self) -> None:
        said = [ErrorCode.OUT_OF_MEMORY, "a"]
        client = MemoryClient(lambda job: said)
        job = client.submit(prompt="?", generation={"n": 2, "temperature": 1, "seed": 7})
        before = job.result(0)
        assert seeded(AnalysisJob(prompt="?", generation={"n": 2}), before).generation.seed == 7


class TestBatches:
    def test_questions_for_all_stand_back_where_a_line_asks_something_itself(self, tmp_path: Path) -> None:
        lines = {"of all": {}, "its own": {"prompt": "?"}, "its own ones": {"questions": ["a?", "b?", "c?"]}}
        body = {"messages": [{"role": "user", "content": "?"}]}
        given = tmp_path / "in.jsonl"
        written = [{"custom_id": name, **fields} for name, fields in lines.items()]
        given.write_text("\n".join(map(json.dumps, [*written, {"custom_id": "openai", "body": body}])))
        client = MemoryClient(lambda job: "yes")
        report = tmp_path / "report.html"
        batch = client.submit_batch(given, tmp_path / "out.jsonl", questions=["What is it?", "Why?"], report=report)
        assert batch.wait(30).failed == 0
        found = {line["custom_id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
        assert {name: len(found[name]["answers"]) for name in lines} == {"of all": 2, "its own": 0, "its own ones": 3}
        assert len(found["openai"]["response"]["body"]["choices"]) == 1
        page = report.read_text()
        for text in ("1. What is it?", "2. Why?", "3. c?", "3. yes"):
            assert text in page

    def test_cells_of_a_table_hold_schemas_and_questions_as_json_or_a_regular_expression(self, tmp_path: Path) -> None:
        table = tmp_path / "in.csv"
        table.write_text(
            "custom_id,prompt,questions,response_schema,n\n"
            'schema,?,,"{""type"": ""object""}",\n'
            'choices,?,,"[""red"", ""blue""]",2\n'
            "regex,?,,[a-z]+,\n"
            'questions,,"[{""prompt"": ""a?""}, {""prompt"": ""b?""}]",,\n'
        )
        client = MemoryClient(lambda job: "{}")
        assert client.submit_batch(table, tmp_path / "out.jsonl").wait(30).failed == 0
        schema, choices, regex, questions = map(client.asked, client.jobs)
        assert (schema.response_schema, regex.response_schema) == ({"type": "object"}, "[a-z]+")
        assert (choices.response_schema, choices.generation.n) == (("red", "blue"), 2)
        assert [each.prompt for each in questions.questions] == ["a?", "b?"]

    def test_a_folder_may_be_asked_several_questions(self, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.jpg").write_bytes(b"\xff\xd8\xff")
        client = MemoryClient(lambda job: "{}")
        options: dict[str, Any] = {"questions": ["a?", "b?"], "response_schema": COLOUR}
        assert client.submit_batch(tmp_path / "photos", tmp_path / "out.jsonl", **options).wait(30).failed == 0
        fields = read_fields((tmp_path / "out.jsonl").read_bytes())
        assert not isinstance(fields, InvalidJob)
        assert [each["parsed"] for each in fields["answers"]] == [{}, {}]
        other = {**options, "questions": ["a?", {"prompt": "c?", "generation": {"seed": 1}}]}
        with pytest.raises(InvalidBatch, match=r'"questions": \[\{.*"prompt": "a\?"\}, \{.*"prompt": "b\?"\}\]'):
            client.submit_batch(tmp_path / "photos", tmp_path / "out.jsonl", **other)
