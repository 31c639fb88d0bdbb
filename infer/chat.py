"""`python -m infer chat`: a conversation, line by line.

An answer that Ctrl-C stopped stays in the chat as far as it came, since that is what the user has read. Thoughts are
shown as the model writes them, faintly on a terminal. They are kept apart from answers, and the format leaves old
ones out of what the model reads.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from infer.config import DEFAULT_TOOL_ROUNDS, Chat
from infer.dialects import Message, dialect
from infer.model import open_for
from infer.terminal import FAINT, PLAIN, has_colour, note, safe, warn
from infer.tools import Toolbox
from qwen_jax.engine import Capacity, Request, generate
from qwen_jax.errors import ConfigError, DataError, FileError, ModelError, SandboxError
from qwen_jax.text.chat import Format, encode, text_of, window
from qwen_jax.text.messages import Call
from qwen_jax.weights.usage import turn_ends

HELP = """\
/system TEXT  set the system message; without TEXT, the format's own is used
/retry        answer the last message again
/clear        forget all messages but the system message
/save FILE    write the chat to FILE: a line of JSON {"messages": [...]}, as training reads it
/load FILE    go on with the chat in FILE
/exit         leave
Any other line is a message. One that ends in \\ goes on in the next line; a space before / makes it no command."""


def run(options: Chat) -> int:
    """Talks until the input ends; the exit code."""
    with contextlib.closing(_toolbox(options)) as tools:
        return _talk(Conversation(options, tools))


def _talk(chat: Conversation) -> int:
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # text that is not UTF-8 gets its line as any other bad message
    sys.stdout.reconfigure(errors="replace")
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  imported, it gives input() its keys and its history
        print(f"{chat.opened.model.path.name}, chat format {chat.form.name}; /help lists the commands", file=sys.stderr)
    while True:
        try:
            line = _read_message(interactive)
            if line.strip() and not _obey(chat, line):
                return 0
        except EOFError:
            if interactive:
                print()
            return 0
        except (ConfigError, DataError, FileError, ModelError, SandboxError) as error:
            print(f"infer: error: {error}", file=sys.stderr)


def _obey(chat: Conversation, line: str) -> bool:
    """Does what a line says; False to leave. Ctrl-C stops that, and not the chat."""
    try:
        return _do(chat, line)
    except KeyboardInterrupt:  # between the parts of an answer: within one, it is for that part to say what stays
        print(file=sys.stderr)
        return True


def _do(chat: Conversation, line: str) -> bool:
    command, _, rest = line.rstrip().partition(" ")  # nothing, where a space comes first
    rest = rest.strip()
    if command == "/exit":
        return False
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/system":
        chat.set_system(rest or None)
    elif command == "/clear":
        chat.clear()
    elif command == "/retry":
        chat.retry()
    elif command in ("/save", "/load"):
        if not rest:
            raise ConfigError(f"{command} needs the name of a file")
        (chat.save if command == "/save" else chat.load)(Path(rest))
    elif command.startswith("/") and command not in ("/think", "/no_think"):  # which Qwen3 takes as words of a message
        raise ConfigError(f"no command {command}; /help lists them, and a space before / makes it a message")
    else:
        chat.ask(line.strip())
    return True


def _read_message(interactive: bool) -> str:
    """Lines up to one that does not end in a backslash. Raises EOFError at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            if interactive:
                line = input("… " if lines else "> ")
            elif not (line := sys.stdin.readline()):
                raise EOFError
        except EOFError:
            if lines:
                return "\n".join(lines)
            raise
        line = line.rstrip("\r\n")
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


class Conversation:
    """A chat with a model.

    Attributes:
      opened: the model, with how it is sampled from.
      form: format of the chat.
      messages: all of it, as OpenAI and TRL write messages.
    """

    def __init__(self, options: Chat, tools: Toolbox) -> None:
        if "data" in options.mesh:
            raise ConfigError("--mesh data: a chat has one answer at a time, and one copy of the model; leave it out")
        self.opened = open_for(options)
        self.form = self.opened.chat_format()
        self.messages: list[Message] = []
        self._options = options
        self._tools, self._tool_rounds = tools, options.max_tool_rounds or DEFAULT_TOOL_ROUNDS
        self._dialect = dialect(self.form, tools)
        self._num_answers = 0
        self._num_left_out = 0  # of the oldest messages after the system message: the model does not see them
        self._length, asked = self.opened.room(options.max_length), options.max_new_tokens
        if asked and asked >= self._length:
            raise ConfigError(f"--max-new-tokens {asked}: there are {self._length} positions, for the chat as well")
        self._limit = asked or self.opened.usage.max_new_tokens
        # An answer has room even where the chat is long: what was asked for, else up to a quarter of all there is.
        self._room = self._length - (asked or min(self._limit or self._length, self._length // 4))
        if options.load is not None:
            self.load(options.load)
        if options.system is not None:
            self.set_system(options.system)
        self._stop_ids = self.opened.usage.stop_ids | turn_ends(self.opened.tokenizer)
        self._engine = self.opened.load(Capacity(max_rows=1, max_length=self._length))
        self.opened.report()

    def ask(self, text: str) -> None:
        """Adds a message of the user's and its answer; neither where that fails."""
        self._answer([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> None:
        """Answers the last message of the user's anew."""
        last = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not last:
            raise ConfigError("there is no message to answer again")
        self._answer(self.messages[: last[-1] + 1])

    def set_system(self, text: str | None) -> None:
        system = [] if text is None else [{"role": "system", "content": text}]
        self.messages = [*system, *self.messages[_num_system(self.messages) :]]

    def clear(self) -> None:
        self.messages = self.messages[: _num_system(self.messages)]
        self._num_left_out = 0

    def save(self, path: Path) -> None:
        """Writes one line of JSON, a row that training reads."""
        schemas = self._dialect.schemas
        row = {"messages": self.messages} | ({"tools": schemas} if schemas else {})
        try:
            path.expanduser().write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Goes on with the chat in a file. Raises DataError, with this chat unchanged, if it has none."""
        try:
            row = json.loads(path.expanduser().read_text("utf-8"))
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not one chat in JSON ({error})") from error
        schemas = self._dialect.schemas
        if not isinstance(row, dict) or row.keys() - ({"tools"} if schemas else set()) != {"messages"}:
            found = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
            raise DataError(f'{path} has {found}; an object with "messages" and nothing else is wanted')
        if row.get("tools", schemas) != schemas:
            raise DataError(f"{path} has tools that are not those of this chat; begin with the same --tools")
        try:
            self._dialect.pieces(row["messages"], None)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        self.messages = row["messages"]
        self._num_left_out = 0

    def _answer(self, messages: list[Message]) -> None:
        """Streams an answer to `messages`, which with it become the chat; after calls of tools, another."""
        for left in reversed(range(self._tool_rounds + 1)):
            answer, calls = self._speak(messages)
            if answer is None:
                return
            results, goes_on = self._call(calls) if left else (["not run: too many calls in a row"] * len(calls), False)
            self.messages = messages = self._dialect.extended(messages, answer, results)
            if not (calls and goes_on):
                break
        if calls and not left:
            warn(f"the model called tools after {self._tool_rounds} rounds of calls; --max-tool-rounds sets that")

    def _speak(self, messages: list[Message]) -> tuple[Message | None, Sequence[Call]]:
        """Streams one answer and gives it, with its calls; None if it was interrupted before it began."""
        ids, in_thought = self._prompt(messages)
        limit = min(self._limit or sys.maxsize, self._length - len(ids))
        completion = self._dialect.completion(self.opened.tokenizer, self._stop_ids, in_thought)
        screen = _Screen(thinks=self.form.thinks, in_thought=in_thought)
        request = Request(
            prompt=ids,
            max_new_tokens=limit,
            sampling=self.opened.sampling,
            seed=self._options.seed,
            row=self._num_answers,
            stop_ids=self._stop_ids,
        )
        interrupted = False
        try:
            generate(self._engine, [(request, completion)], show=lambda index, piece: screen.show(piece))
        except KeyboardInterrupt:
            interrupted = True
            screen.show(completion.end("interrupted"))
        finally:
            screen.close()
        self._num_answers += 1
        if completion.finish_reason == "length":
            reason = "--max-new-tokens sets that" if limit == self._limit else "the model has no more positions"
            warn(f"the answer was cut after {limit} tokens; {reason}")
        if interrupted and not completion.text:
            return None, ()
        answer, calls = self._dialect.read(completion, in_thought)
        if interrupted or completion.finish_reason == "length":  # which may have cut a call, too
            return {field: value for field, value in answer.items() if field != "tool_calls"}, ()
        return answer, calls

    def _call(self, calls: Sequence[Call]) -> tuple[list[str], bool]:
        """Results of calls, and whether the answer goes on: Ctrl-C stops a tool, and with it the answer."""
        results: list[str] = []
        for call in calls:
            try:
                note(f"{call.name} {call.arguments}")
                results.append(self._tools.call(call))
                note(results[-1])
            except KeyboardInterrupt:
                return results + ["stopped by the user"] * (len(calls) - len(results)), False
        return results, True

    def _prompt(self, messages: list[Message]) -> tuple[list[int], bool]:
        """Ids of the newest of `messages` that leave room for an answer, and whether it begins within a thought."""
        first = _num_system(messages)
        kept = self._window([*messages[:first], *messages[first + self._num_left_out :]])
        while True:
            thinking = None if self._options.thinking else False
            pieces = self._dialect.pieces(kept, thinking)
            ids = encode(self.opened.tokenizer, pieces).ids
            if len(ids) <= self._room:
                break
            later = [index for index in range(first + 1, len(kept)) if kept[index]["role"] == "user"]
            if not later:
                raise DataError(f"the message makes a prompt of {len(ids)} tokens; there is room for {self._room}")
            kept = [*kept[:first], *kept[later[0] :]]
        if (left_out := len(messages) - len(kept)) > self._num_left_out:
            warn(f"the chat is too long for the model, which does not see the oldest {left_out} messages any more")
            self._num_left_out = left_out
        return ids, text_of(pieces).endswith("<think>\n")

    def _window(self, messages: list[Message]) -> list[Message]:
        """What the prompt builder of Qwen1 keeps; with other models, all messages."""
        size = self.opened.usage.window
        if size is None or not isinstance(self.form, Format):
            return messages
        return window(self.opened.tokenizer, self.form, messages, max_window_size=size)


def _num_system(messages: list[Message]) -> int:
    return int(bool(messages) and messages[0]["role"] == "system")


def _toolbox(options: Chat) -> Toolbox:
    """The tools that the options name."""
    if not (options.tools or options.code_interpreter) and (options.max_tool_rounds or options.allow_weak_sandbox):
        raise ConfigError("--max-tool-rounds and --allow-weak-sandbox are for --tools or --code-interpreter")
    return Toolbox(options.tools, interpreter=options.code_interpreter, allow_weak=options.allow_weak_sandbox)


class _Screen:
    """An answer on standard output. Thoughts are faint on a terminal: tags are tokens, so no tag is cut in two."""

    def __init__(self, *, thinks: bool, in_thought: bool) -> None:
        self._paints = thinks and has_colour()
        if self._paints and in_thought:
            print(FAINT, end="")

    def show(self, piece: str) -> None:
        piece = safe(piece)
        if self._paints:
            piece = piece.replace("<think>", f"{FAINT}<think>").replace("</think>", f"</think>{PLAIN}")
        print(piece, end="", flush=True)

    def close(self) -> None:
        print(PLAIN if self._paints else "", flush=True)
