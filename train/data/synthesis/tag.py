"""Open tagging, as InsTag (Lu et al. 2023) has it: the model names what is asked for; equal names are made one."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from train.data.synthesis import rows
from train.data.synthesis.config import Tag
from train.data.synthesis.prompts import Prompt
from train.data.synthesis.rows import Row
from train.data.synthesis.stages import Ask, Outcome, Outcomes, Stage, Work

_SHOWN = 20  # tags in the report
_TAG_CHARACTERS, _EXPLANATION_CHARACTERS = 60, 200

Words = frozenset[str]


class TagStage(Stage):
    """Adds `tags`, and `tag_explanations` in the model's own words."""

    def __init__(self, config: Tag) -> None:
        super().__init__()
        self._config = config
        self._prompt = Prompt(config.prompt, ["instruction", "max_tags"])
        self.prompts = [self._prompt]
        self._schema = _schema(config.max_tags)

    def check(self, row: Row) -> None:
        rows.instruction(row, self._config.field)

    def work(self, row: Row, index: int) -> Work:
        words = rows.instruction(row, self._config.field)
        question = self._prompt.fill(instruction=words, max_tags=str(self._config.max_tags))
        [answer] = yield [Ask.user(question, self._schema)]
        fault = answer.fault
        found: dict[str, str] = {}
        if fault is None:
            try:
                said = answer.json()
                found = {name: entry["explanation"] for entry in said if (name := clean(entry["tag"]))}
            except (ValueError, TypeError, KeyError, AttributeError):
                fault = "no list of tags"
        if fault:
            return Outcome(dropped=Counter([fault]))
        return Outcome(kept=[{**row, "tag_explanations": found}])

    def collect(self, outcomes: Outcomes) -> Iterator[Row]:
        said = Counter(tag for outcome in outcomes for row in outcome.kept for tag in row["tag_explanations"])
        names = merge(said, self._config.min_frequency)
        used: Counter[str] = Counter()
        for outcome in outcomes:
            for row in outcome.kept:
                tags = sorted({names[tag] for tag in row["tag_explanations"] if tag in names})
                used.update(tags)
                yield {**row, "tags": tags}
        self.facts = {
            "tags said": len(said),
            "tags used": len(used),
            "tags too rare": sum(tag not in names for tag in said),
            "most frequent": dict(sorted(used.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]),
        }


def clean(tag: str) -> str:
    """A tag in small letters, with one space between its words."""
    return " ".join(re.sub(r"[\W_]+", " ", tag.casefold()).split())


def merge(said: Mapping[str, int], min_frequency: int) -> dict[str, str]:
    """The tag that takes the place of each, by the numbers of rows that have them; rare ones may have none.

    Tags of the same words, whatever their order and number (singular or plural), are one, by the name that most rows
    have. One that is rarer than `min_frequency` becomes, of those that are not, the one with most words among its own.
    """
    groups: dict[Words, list[str]] = defaultdict(list)
    for tag in sorted(said, key=lambda tag: (-said[tag], tag)):
        groups[_words(tag)].append(tag)
    totals = {words: sum(said[tag] for tag in group) for words, group in groups.items()}
    frequent = {words: group[0] for words, group in groups.items() if totals[words] >= min_frequency}
    having: dict[str, list[Words]] = defaultdict(list)
    for words in frequent:
        for word in words:
            having[word].append(words)
    names: dict[str, str] = {}
    for words, group in groups.items():
        within = {other for word in words for other in having[word] if other <= words}
        if within:
            best = max(within, key=lambda other: (len(other), totals[other], frequent[other]))
            names |= dict.fromkeys(group, frequent[best])
    return names


def _words(tag: str) -> Words:
    return frozenset(map(_singular, tag.split()))


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        return word[:-2] if word.endswith(("xes", "ches", "shes", "sses")) else word[:-1]
    return word


def _schema(max_tags: int) -> Mapping[str, Any]:
    entry = {
        "type": "object",
        "properties": {
            "tag": {"type": "string", "minLength": 1, "maxLength": _TAG_CHARACTERS},
            "explanation": {"type": "string", "maxLength": _EXPLANATION_CHARACTERS},
        },
        "required": ["tag", "explanation"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": entry, "minItems": 1, "maxItems": max_tags}
