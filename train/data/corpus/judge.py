"""Questions about documents to a Qwen, which answers with one token out of a few."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import jax

from qwen_jax.config import ModelConfig
from qwen_jax.engine import Capacity, Engine, Request, Sampling, Token
from qwen_jax.engine.request import MAX_LOGPROBS
from qwen_jax.errors import ConfigError, ModelError, NumericalError
from qwen_jax.model import Params
from qwen_jax.sharding import make_mesh
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import Format, encode
from qwen_jax.text.template import JinjaFormat
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from qwen_jax.weights.usage import read_usage
from train.data.corpus.config import Judged, Quality
from train.data.corpus.documents import Document

# Added to the logits of all answers: more than any other token is ahead of them.
BIAS = 100.0
# What a text that was cut to some tokens may need more, where it meets the question.
SLACK = 16


def ask(
    documents: Iterable[Document], settings: Quality | Judged, question: str, answers: Sequence[str]
) -> Iterator[tuple[Document, dict[str, float]]]:
    """Documents in order, each with the probabilities of the answers; of answers that are unlikely, 0.

    They are those of the model's next token, among the answers that are one of its 20 likeliest, or the likeliest.
    """
    judge = Judge.load(settings.model)
    ids = {judge.token(answer): answer for answer in answers}
    room = len(judge.prompt(question.replace("{text}", ""))) + settings.max_tokens + SLACK
    engine = judge.engine(room, settings.batch_size)
    sampling = Sampling(temperature=0.0, logit_bias=tuple((token, BIAS) for token in ids))
    waiting, done, order = iter(documents), {}, {}
    first = last = 0
    with jax.set_mesh(engine.mesh):
        while True:
            while last - first < 2 * settings.batch_size and (document := next(waiting, None)):
                text = judge.beginning(document.text, settings.max_tokens)
                prompt = judge.prompt(question.replace("{text}", text))[-room:]
                request = Request(prompt=prompt, max_new_tokens=1, sampling=sampling, logprobs=MAX_LOGPROBS)
                order[engine.add(request)] = last, document
                last += 1
            if first == last:
                return
            for token in engine.step():
                number, document = order.pop(token.request)
                done[number] = document, _probabilities(token, ids)
            while first in done:
                yield done.pop(first)
                first += 1


def _probabilities(token: Token, ids: dict[int, str]) -> dict[str, float]:
    """The probability of each answer, among the answers, to 4 digits: the last ones are the machine's."""
    if token.finish_reason == "error":
        raise NumericalError("the model's logits are not finite (NaN or inf); the weights or the dtype cannot be used")
    logs = {token.id: token.logprob or 0.0} | {id: log for id, log in token.top or () if id in ids}
    most = max(logs.values())
    shares = {ids[id]: math.exp(log - most) for id, log in logs.items()}
    total = sum(shares.values())
    return {answer: round(shares.get(answer, 0.0) / total, 4) for answer in ids.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """A model that is asked."""

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    form: Format | JinjaFormat | None

    @classmethod
    @functools.cache
    def load(cls, name: str) -> Judge:
        """The model a user names, read once. Raises FileError or ModelError."""
        warn = lambda line: print(f"warning: {line}", file=sys.stderr)
        with open_model(name, warn=warn) as model:
            if model.config.score:
                raise ModelError(f"{model.path} is a reward or classification model, which answers no questions")
            tokenizer = model.tokenizer()
            tokenizer.check_fits(model.config.vocab_size)
            form = read_usage(model, tokenizer, warn=warn).chat_format(tokenizer, warn=warn)
            dtype = model.config.dtype
            with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
                params = load_params(model, dtype=dtype, stacked=False)
            config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype)
        return cls(name=name, config=config, params=params, tokenizer=tokenizer, form=form)

    def engine(self, length: int, rows: int) -> Engine:
        """A fresh one: what it has seen before would change the last digits of what it computes."""
        if length + 1 > self.config.max_position:
            raise ConfigError(
                f"{self.name} has {self.config.max_position} positions, and question and document take {length}; "
                "choose a lower max_tokens"
            )
        capacity = Capacity(max_rows=rows, max_length=length + 1)
        mesh = make_mesh(devices=jax.devices()[:1])
        return Engine(self.config, self.params, num_tokens=self.tokenizer.num_tokens, mesh=mesh, capacity=capacity)

    def token(self, answer: str) -> int:
        """The token of an answer. A ModelError if it is several."""
        ids = self.tokenizer.encode(answer)
        if len(ids) != 1:
            raise ModelError(f"{self.name} has no token for the answer {answer!r}; ask another model")
        return ids[0]

    def beginning(self, text: str, max_tokens: int) -> str:
        """The first tokens of a text, as text."""
        # No token is longer than this many characters of ordinary text for long: what follows cannot be shown.
        ids = self.tokenizer.encode(text[: 32 * max_tokens])[:max_tokens]
        return self.tokenizer.decode(ids).removesuffix("\ufffd")

    def prompt(self, question: str) -> list[int]:
        """The question as the model is asked: in its chat format, or as it is."""
        if self.form is None:
            return self.tokenizer.encode(question)
        thinking = False if self.form.thinks else None
        messages = [{"role": "user", "content": question}]
        pieces = self.form.render(messages, add_generation_prompt=True, enable_thinking=thinking)
        return encode(self.tokenizer, pieces).ids
