"""How many tokens a job can come to at the least, told without its vocabulary."""

import re

from keye.config.job import AnalysisJob, ChatMessage, TextPart

# White space and digits of ASCII, which no release of Unicode sees otherwise; workers drop the noncharacter.
_WORDS = re.compile(r"[0-9]|[^ \t\r\n0-9\ufdd0][^ \t\r\n0-9]*")


def least_tokens(job: AnalysisJob) -> int:
    """Fewest that texts, media and answer can come to, whatever the vocabulary; the chat template's are not among them.

    Of several questions, each of which is read by itself, those of the longest.

    Keye-VL's tokenizers cut at white space and around each digit before they look at a vocabulary.
    """
    return max(map(_of_one, job.by_question()))


def _of_one(job: AnalysisJob) -> int:
    return sum(map(_least_text_tokens, job.conversation())) + len(job.all_media()) + job.generation.max_new_tokens


def _least_text_tokens(turn: ChatMessage) -> int:
    parts = [TextPart(text=turn.content)] if isinstance(turn.content, str) else turn.content
    # Neighbouring texts are joined before they are read, and may meet within a word.
    return len(_WORDS.findall("".join(part.text if isinstance(part, TextPart) else " " for part in parts)))
