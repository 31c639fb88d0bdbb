"""The chat page, in a headless browser, against a server that says what a test tells it to."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import select
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import infer

PAGE = Path(infer.__file__).parent / "server"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium", allow_module_level=True)
fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

# Stricter than any server needs to be: with it no text can become markup, even by mistake.
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
# Steps of an answer, beside deltas and bytes: the connection breaks; the answer ends without its last lines; nothing
# comes until the test lets it, or the client goes.
CUT, END, HOLD = object(), object(), object()
# Seconds until what a test waits for counts as missing.
PATIENCE = 20
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}


class Server:
    """Speaks the streaming API.

    Attributes:
      answers: what the next requests get: the steps of an answer, or the response that refuses it.
      bodies: JSON of the requests so far.
      key: what requests must have, if anything.
      models: names of those that are served.
      go: set by a test that lets answers go on which are held.
      left: set once an answer ended before it was complete.
    """

    def __init__(self) -> None:
        self.reset()
        self.app = fastapi.FastAPI()
        self.app.get("/{name}")(self._file)
        self.app.get("/")(lambda: self._file("page.html"))
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._chat)

    def reset(self) -> None:
        self.answers: list = []
        self.bodies: list[dict] = []
        self.key, self.models = None, ["tiny"]
        self.go, self.left = threading.Event(), threading.Event()

    def _file(self, name: str):
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return fastapi.responses.FileResponse(PAGE / name, headers=headers)

    def _refuses(self, request: fastapi.Request):
        given = request.headers.get("authorization", "").encode("latin-1")
        return refusal(401, "no key for you") if self.key and given != f"Bearer {self.key}".encode() else None

    def _models(self, request: fastapi.Request):
        return self._refuses(request) or {"data": [{"id": name} for name in self.models]}

    async def _chat(self, request: fastapi.Request):
        self.bodies.append(await request.json())
        answer = self._refuses(request) or self.answers.pop(0)
        if isinstance(answer, fastapi.Response):
            return answer
        return fastapi.responses.StreamingResponse(self._stream(answer), media_type="text/event-stream")

    async def _stream(self, steps):
        yield sse(choices=[{"delta": {"role": "assistant", "content": ""}}])
        try:
            for step in steps:
                if step is CUT:
                    raise ConnectionError
                if step is END:
                    return
                if step is HOLD:
                    while not self.go.is_set():
                        await asyncio.sleep(0.01)
                elif isinstance(step, bytes):
                    yield step
                else:
                    yield ": a comment\n\n"
                    yield sse(**step) if "error" in step else sse(choices=[{"delta": step}])
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
        yield sse(choices=[{"delta": {}, "finish_reason": "stop"}])
        yield sse(choices=[], usage=USAGE) + "data: [DONE]\n\n"


def sse(*, ascii: bool = True, **chunk) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=ascii)}\n\n"


def refusal(status: int, message: str, **headers):
    return fastapi.responses.JSONResponse({"error": {"message": message}}, status, headers)


def says(*pieces: str) -> list[dict]:
    return [{"content": piece} for piece in pieces]


class Browser:
    """Chromium, driven through the pipe of its DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        command = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank",
        ]  # fmt: skip
        # It reads commands from its file 3 and writes to its file 4.
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self._num_sent, self._held, self._session = 0, b"", None
        self.events: list[dict] = []
        target = next(each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params) -> dict:
        self._num_sent += 1
        message = {"id": self._num_sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._num_sent:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def wait_for_event(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict:
        while b"\0" not in self._held:
            assert select.select([self._process.stdout], [], [], 2 * PATIENCE)[0], "the browser is silent"
            self._held += (piece := os.read(self._process.stdout.fileno(), 1 << 20))
            assert piece, "the browser is gone"
        message, self._held = self._held.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        self._session = None
        self.send("Browser.close")
        self._process.wait(PATIENCE)
        self._process.stdin.close()
        self._process.stdout.close()


class Page:
    """The chat page in a browser; what a user does to it, and what there is to see."""

    def __init__(self, browser: Browser, server: Server, address: str) -> None:
        self.browser, self.server, self.address = browser, server, address

    def open(self) -> None:
        self.browser.events.clear()
        self.browser.send("Page.navigate", url=self.address)
        self.browser.wait_for_event("Page.loadEventFired")

    def run(self, script: str):
        """The value of an expression, which may be a promise."""
        done = self.browser.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        wait = f"""(async () => {{
            for (const end = Date.now() + {PATIENCE * 1000}; Date.now() < end;) {{
                if ({condition}) return true;
                await new Promise((resolve) => setTimeout(resolve, 5));
            }}
        }})()"""
        assert self.run(wait), f"{condition}\n{self.run('document.body.innerText')}"

    def key(self, key: str, modifiers: int = 0) -> None:
        code = {"Enter": 13, "Escape": 27}[key]
        press = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.browser.send("Input.dispatchKeyEvent", type="keyDown", text="\r" * (key == "Enter"), **press)
        self.browser.send("Input.dispatchKeyEvent", type="keyUp", **press)

    def type(self, text: str) -> None:
        self.browser.send("Input.insertText", text=text)

    def ask(self, text: str, answer) -> None:
        """Sends a message and waits until its answer is complete, or failed."""
        self.begin(text, answer)
        self.wait("!document.body.classList.contains('busy')")

    def begin(self, text: str, answer) -> None:
        self.server.answers.append(answer)
        self.run("document.querySelector('#draft').focus()")
        self.type(text)
        self.key("Enter")

    def click(self, selector: str) -> None:
        """Clicks the last such thing that is to be seen."""
        seen = f"[...document.querySelectorAll({json.dumps(selector)})].filter((one) => one.checkVisibility()).at(-1)"
        self.wait(seen)
        self.run(f"{seen}.click()")

    def fill(self, name: str, value: str) -> None:
        """Gives a setting a value, as a user who leaves the field."""
        field = f"document.querySelector('#settings').elements[{json.dumps(name)}]"
        self.run(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('change', {{bubbles: true}}))")

    def texts(self, selector: str) -> list[str]:
        """What is to be read in all such things that are to be seen."""
        return self.run(
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            ".filter((one) => one.checkVisibility()).map((one) => one.innerText.trim())"
        )

    def load(self, path: Path) -> None:
        root = self.browser.send("DOM.getDocument")["root"]["nodeId"]
        node = self.browser.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.browser.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self) -> bytes:
        return base64.b64decode(self.browser.send("Page.captureScreenshot")["data"])

    def faults(self) -> list[dict]:
        """Exceptions, and what the policy refused; that a request failed is no fault of the page's."""
        thrown = [event for event in self.browser.events if event["method"] == "Runtime.exceptionThrown"]
        logged = [event for event in self.browser.events if event["method"] == "Log.entryAdded"]
        return thrown + [event for event in logged if event["params"]["entry"]["source"] != "network"]


@contextmanager
def opened(folder: Path):
    """A page, with its browser and its server."""
    server = Server()
    config = uvicorn.Config(server.app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    browser = Browser(folder)
    try:
        while not running.started:
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        yield Page(browser, server, f"http://127.0.0.1:{port}/")
    finally:
        browser.close()
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def the_page(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("browser")) as page:
        page.open()
        yield page


@pytest.fixture
def page(the_page):
    """As a user finds it who was never here."""
    the_page.server.reset()
    the_page.run("localStorage.clear(); sessionStorage.clear()")
    the_page.open()
    the_page.wait("document.title === 'tiny'")
    yield the_page
    assert the_page.faults() == []


def test_an_answer_streams(page):
    page.begin("hi", [{"reasoning_content": "let me "}, {"reasoning_content": "see"}, HOLD])
    page.wait("document.querySelector('.thought').innerText.includes('let me see')")
    assert page.texts(".thought summary") == ["Thinking"]
    assert page.texts("#stop, #send") == ["Stop"]
    page.key("Escape")
    page.wait("!document.body.classList.contains('busy')")
    letter = sse(choices=[{"delta": {"content": " \N{SNOWMAN}"}}], ascii=False).encode()
    at = letter.index("\N{SNOWMAN}".encode()) + 1
    page.begin("again", [{"reasoning_content": "hm"}, *says("One ", "**two**"), letter[:at], HOLD, letter[at:]])
    page.wait("[...document.querySelectorAll('.text')].at(-1).innerText === 'One two'")
    page.server.go.set()
    page.wait("!document.body.classList.contains('busy')")
    assert page.texts(".assistant .text") == ["", "One two \N{SNOWMAN}"]
    assert page.run("document.querySelectorAll('.thought[open]').length") == 0
    [note] = page.texts(".note")[1:]
    assert "3 tokens" in note and "tokens/s" in note and "prompt 7 tokens, 4 cached" in note
    thought = {"role": "assistant", "content": "", "reasoning_content": "let me see"}
    assert page.server.bodies[1] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}, thought, {"role": "user", "content": "again"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_every_setting_is_sent_and_none_that_is_empty(page):
    numbers = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "max_tokens": 64, "seed": 7,
        "repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25,
    }  # fmt: skip
    for name, value in numbers.items():
        page.fill(name, str(value))
    page.fill("thinking", "off")
    page.fill("system", "Be brief.")
    page.ask("hi", says("ok"))
    [body] = page.server.bodies
    assert {name: body[name] for name in numbers} == numbers
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.fill("top_p", "3")
    page.begin("more", says("never"))
    page.wait("document.querySelector('#panel').open")
    assert len(page.server.bodies) == 1


def test_stop_reaches_the_server_and_what_came_stays(page):
    page.begin("hi", [*says("half an"), HOLD])
    page.wait("document.querySelector('.assistant .text')?.innerText === 'half an'")
    page.type("next")
    page.key("Enter")
    page.click("#stop")
    assert page.server.left.wait(PATIENCE)
    page.wait("!document.body.classList.contains('busy')")
    assert page.texts(".note") == ["stopped"]
    assert page.run("document.querySelector('#draft').value") == "next"
    page.ask("", says("ok"))
    assert page.server.bodies[1]["messages"][1] == {"role": "assistant", "content": "half an"}


@pytest.mark.parametrize(
    ("answer", "line", "kept"),
    [
        (lambda: refusal(429, "too many", **{"Retry-After": "3"}), "too many Try again in 3 s.", ""),
        (lambda: refusal(500, "it\nbroke"), "it broke", ""),
        (lambda: fastapi.Response("<h1>proxy</h1>", 502), "The server failed: 502 Bad Gateway", ""),
        (lambda: [*says("half"), HOLD, CUT], "The connection broke before the answer was complete.", "half"),
        (lambda: [*says("half"), END], "The connection broke before the answer was complete.", "half"),
        (lambda: [*says("half"), {"error": {"message": "no pages"}}], "no pages", "half"),
    ],
)
def test_an_error_is_one_line_with_a_way_out(page, answer, line, kept):
    page.begin("hi", answer())
    page.wait(f"document.querySelector('.assistant .text')?.innerText === '{kept}'")
    page.server.go.set()
    page.wait("document.querySelector('.error').checkVisibility()")
    assert page.texts(".error span") == [line] and page.texts(".assistant .text") == [kept]
    page.server.answers.append(says("whole"))
    page.click(".error button")
    page.wait("document.querySelector('.assistant .text')?.innerText === 'whole'")
    assert page.texts(".error") == [] and len(page.texts("article")) == 2
    assert page.server.bodies[1]["messages"] == [{"role": "user", "content": "hi"}]


def test_a_key_is_asked_for_and_forgotten_with_the_tab(page):
    page.server.key = "sésame"
    page.open()
    page.wait("!document.querySelector('#notice').hidden")
    assert "wants an API key" in page.texts("#notice")[0]
    page.click("#notice button")
    assert page.run("document.activeElement.name") == "key"
    page.fill("key", "sésame")
    page.wait("document.title === 'tiny' && document.querySelector('#notice').hidden")
    page.key("Escape")
    page.ask("hi", says("in"))
    assert page.texts(".assistant .text") == ["in"]
    assert "sésame" not in page.run("JSON.stringify(localStorage)")
    assert page.run("sessionStorage.getItem('key')") == '"sésame"'
    page.fill("key", "wrong")
    page.wait("!document.querySelector('#notice').hidden")
    page.ask("hi", says("never"))
    assert page.texts(".error span") == ["no key for you"]
    page.fill("key", "sésame")
    page.ask("now", says("in"))
    roles = [message["role"] for message in page.server.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user", "user"]


def test_regenerate_edit_and_copy(page):
    page.ask("first", says("one"))
    page.ask("secnd", says("two"))
    page.server.answers.append(says("three"))
    page.click("[data-do=again]")
    page.wait("[...document.querySelectorAll('.text')].at(-1).innerText === 'three'")
    assert page.server.bodies[2] == page.server.bodies[1]
    page.click("[data-do=edit]")
    page.run("document.activeElement.select()")
    page.type("second")
    page.server.answers.append(says("```py\nx = 1\n```"))
    page.key("Enter")
    page.wait("document.querySelector('.code')")
    assert page.server.bodies[3]["messages"][2] == {"role": "user", "content": "second"}
    assert len(page.texts("article")) == 4
    page.run("navigator.clipboard.writeText = async (text) => { globalThis.copied = text }; 0")
    page.click("[data-do=copy-code]")
    page.wait("globalThis.copied === 'x = 1'")
    page.click(".assistant [data-do=copy]")
    page.wait("globalThis.copied === '```py\\nx = 1\\n```'")


def test_keys(page):
    page.run("document.querySelector('#draft').focus()")
    page.type("a")
    page.key("Enter", modifiers=8)  # Shift
    page.type("b")
    page.run(
        "document.activeElement.dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert page.server.bodies == []
    page.begin("", says("ok"))
    page.wait("document.querySelectorAll('.note').length && document.querySelector('.note').innerText")
    assert page.server.bodies[0]["messages"] == [{"role": "user", "content": "a\nb"}]


def test_a_chat_is_kept_and_a_new_one_can_be_taken_back(page):
    page.fill("system", "Be brief.")
    page.ask("hi", [{"reasoning_content": "hm"}, *says("ok")])
    before = page.texts("article"), page.texts(".note")
    page.open()
    assert (page.texts("article"), page.texts(".note")) == before
    assert page.run("document.querySelector('#settings').elements.system.value") == "Be brief."
    page.click("#new")
    assert page.texts("article") == []
    page.click("#notice button")
    assert (page.texts("article"), page.texts(".note")) == before
    page.begin("more", [*says("part"), HOLD])
    page.wait("[...document.querySelectorAll('.text')].at(-1).innerText === 'part'")
    page.open()
    assert page.texts(".text")[-2:] == ["more", "part"]
    page.run("localStorage.setItem('chat', '[{}]')")
    page.open()
    page.wait("document.querySelector('#notice').innerText.includes('cannot be read')")


def test_the_model_that_is_chosen_stays(page):
    page.server.models = ["tiny", "large"]
    page.open()
    page.wait("document.querySelectorAll('#model option').length === 2")
    page.run("model.value = 'large'; model.dispatchEvent(new Event('change', {bubbles: true}))")
    page.open()
    page.wait("document.title === 'large'")
    page.ask("hi", says("ok"))
    assert page.server.bodies[0]["model"] == "large"


def test_export_is_what_import_reads(page, tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "<b>42</b>", "tool_call_id": "c1"},
    ]
    (tmp_path / "in.json").write_text(json.dumps({"messages": messages}))
    page.load(tmp_path / "in.json")
    page.wait("document.querySelectorAll('article').length === 3")
    assert page.texts(".call summary") == ["look"] and page.texts(".call pre") == ['{"at": 1}']
    page.browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "out"))
    page.run("document.querySelector('#export').click()")
    end = time.monotonic() + PATIENCE
    while not (files := list((tmp_path / "out").glob("*.json"))) and time.monotonic() < end:
        time.sleep(0.01)
    assert json.loads(files[0].read_text()) == {"messages": messages}


def test_another_file_changes_nothing(page, tmp_path):
    page.ask("hi", says("ok"))
    texts = {
        "no json": "is not JSON",
        "[]": "has no chat",
        '{"messages": 1}': "has no chat",
        '{"messages": [{"role": "king", "content": ""}]}': "Message 1",
        '{"messages": [{"role": "user"}, {"role": "user", "content": [{"type": "image_url"}]}]}': "Message 2",
    }
    for text, line in texts.items():
        (tmp_path / "bad.json").write_text(text)
        page.load(tmp_path / "bad.json")
        page.wait(f"document.querySelector('#notice').innerText.includes('{line}')")
    assert len(page.texts("article")) == 2


def test_calls_stream(page):
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"at"', ": 1}")]
    second = {"index": 1, "id": "c2", "type": "function", "function": {"name": "wait", "arguments": "{}"}}
    page.ask("hi", [{"tool_calls": [call]} for call in (first, *pieces, second)])
    assert page.texts(".call pre") == ['{"at": 1}', "{}"]
    page.ask("and", says("ok"))
    assert [call["id"] for call in page.server.bodies[1]["messages"][1]["tool_calls"]] == ["c1", "c2"]


def test_text_stays_text(page):
    hostile = (
        "<img src=x onerror=alert(1)> <script>alert(1)</script> [a](javascript:alert(1)) ![b](https://c.test/d.png)"
    )
    hostile += "\n\n```<b>\n</code><img src=x>\n```\n\n| <i>a</i> |\n|-|\n| <svg onload=alert(1)> |"
    names = '{"<img src=x>": 1}'
    call = {"index": 0, "function": {"name": "<u>f</u>", "arguments": names}}
    page.ask(hostile, [{"reasoning_content": hostile}, *says(hostile), {"tool_calls": [call]}])
    assert page.run("document.querySelectorAll('#log :is(img, script, svg, b, i, u)').length") == 0
    assert (
        page.run("[...document.querySelectorAll('#log a')].map((a) => [a.href, a.rel, a.target])")
        == [["https://c.test/d.png", "noopener noreferrer", "_blank"]] * 2
    )
    [text] = page.texts(".assistant > .text")
    for piece in ("<img src=x onerror=alert(1)>", "<script>", "[a](javascript:alert(1))", "<svg onload=alert(1)>"):
        assert piece in text


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("*b* **c** ~~e~~ ***d***", "<p><em>b</em> <strong>c</strong> <del>e</del> <strong><em>d</em></strong></p>"),
        ("2*3*4 * 5, snake_case_name, **open", "<p>2*3*4 * 5, snake_case_name, **open</p>"),
        ("**a `**b` c** `` ` ``", "<p><strong>a <code>**b</code> c</strong> <code>`</code></p>"),
        ("one\ntwo\n\nthree\\*", "<p>one<br>two</p><p>three*</p>"),
        ("# A\n## B #\ntext\n---", "<h2>A</h2><h3>B</h3><p>text</p><hr>"),
        ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote><p>c</p>"),
        (
            "1. a\n   - b\n\n     c\n2. d\n\n3. e",
            '<ol start="1"><li><p>a</p><ul><li><p>b</p><p>c</p></li></ul></li><li><p>d</p></li><li><p>e</p></li></ol>',
        ),
        ("- a\n\t- b\nlazy", "<ul><li><p>a</p><ul><li><p>b<br>lazy</p></li></ul></li></ul>"),
        (r"\(a_1*b*\) and \[x\]", r'<p><span class="math">\(a_1*b*\)</span> and <span class="math">\[x\]</span></p>'),
        ("$$\n- a\n$$\nb", '<div class="math">$$\n- a\n$$</div><p>b</p>'),
        ("https://a.test/b_c_(d). <http://e.test>", None),
        ("[a *b*](https://c.test/d(e)) [f](/g)", None),
    ],
)  # fmt: skip
def test_markdown(page_markdown, text, html):
    if html is not None:
        assert page_markdown(text) == html
        return
    links = page_markdown(text).split("<a ")[1:]
    wanted = ["https://a.test/b_c_(d)", "http://e.test/"] if text[0] == "h" else ["https://c.test/d(e)"]
    assert [link.split('href="')[1].split('"')[0] for link in links] == wanted


def test_code_and_tables(page_markdown):
    code = page_markdown("```py\n# *a*\n\n  b\n```\nc")
    assert "<span>py</span>" in code and "<code># *a*\n\n  b</code>" in code and code.endswith("<p>c</p>")
    assert "<code>half" in page_markdown("~~~\nhalf")
    table = page_markdown("| a | b |\n|:-:|--:|\n| `c` | d \\| e | f |\n| g |\nend")
    assert table.count("<tr>") == 3 and table.count("<td") == 4 and "d | e" in table and "<p>end</p>" in table
    assert "center" in table and "right" in table


@pytest.fixture(scope="module")
def page_markdown(the_page):
    the_page.open()
    the_page.run("import('/page_markdown.js').then((module) => { globalThis.render = module.render })")

    def markdown(text: str) -> str:
        script = (
            "(() => { const target = document.createElement('div'); render(target, %s); return target.innerHTML })()"
        )
        return the_page.run(script % json.dumps(text))

    return markdown


def test_markdown_as_it_streams_is_markdown_of_the_whole(page_markdown, the_page):
    """Of pieces in any order; it loses no letter. What takes much longer than it is long leaves the browser silent."""
    script = """(() => {
        const pieces = ['a', 'b', '*', '**', '_', '`', '```', '\\n', '\\n\\n', '- ', '  ', '1. ', '> ', '# ', '|',
            '|-|', '[', '](https://c.test)', '<', '>', '$$', '\\\\(', '\\\\)', '\\\\[', '~~', '\\t', '---',
            'https://d.test', ' '];
        let seed = 1;
        const draw = () => pieces[(seed = (seed * 48271) % 2147483647) % pieces.length];
        const shown = (texts) => {
            const target = document.createElement('div');
            for (const text of texts) render(target, text);
            return target;
        };
        for (let round = 0; round < 80; round += 1) {
            const parts = Array.from({length: 20}, draw);
            const prefixes = parts.map((_, index) => parts.slice(0, index + 1).join(''));
            const whole = shown(prefixes.slice(-1));
            if (shown(prefixes).innerHTML !== whole.innerHTML) return prefixes.at(-1);
            const letters = (text) => text.replace(/https:..[cd].test/g, '').replace(/Copy|[^ab]/g, '');
            const seen = letters(whole.textContent);
            // The word after a fence names a language, and of it only the first is shown.
            if (!prefixes.at(-1).includes('```') && seen !== letters(prefixes.at(-1))) return [prefixes.at(-1), seen];
        }
        for (const piece of ['(https://c:d)', '\\\\[\\na\\n', '\\\\(']) shown([piece.repeat(30000)]);
        return null;
    })()"""
    assert the_page.run(script) is None


def test_nothing_is_wider_than_a_phone(page):
    page.browser.send("Emulation.setDeviceMetricsOverride", width=320, height=568, deviceScaleFactor=1, mobile=True)
    try:
        wide = "w" * 200
        table = "|".join(["column"] * 12) + "\n" + "|".join(["-"] * 12)
        page.ask(wide, says(f"{wide}\n\n```\n{wide}\n```\n\n{table}\n\n`{wide}`"))
        for element in ("document.documentElement", "document.querySelector('#scroll')"):
            assert page.run(f"{element}.scrollWidth") <= 320
        assert page.run("document.querySelector('#composer').getBoundingClientRect().bottom") <= 568
    finally:
        page.browser.send("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(page, scheme):
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.send("Emulation.setEmulatedMedia", features=media)
    page.ask("hi", [{"reasoning_content": "hm"}, *says("[a](https://b.test) `c`\n\n```\nd\n```")])
    page.ask("hi", refusal(500, "broken"))
    page.click("#open")
    for node in page.browser.send("Accessibility.getFullAXTree")["nodes"]:
        if node["role"]["value"] in ("button", "textbox", "combobox", "spinbutton", "link", "dialog"):
            assert node["name"]["value"], node
    # WCAG 2 wants a contrast of 4.5 for text.
    poor = page.run("""(() => {
        const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
        const light = (color) => rgb(color).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4))
            .reduce((sum, c, index) => sum + c * [.2126, .7152, .0722][index], 0);
        const behind = (one) => {
            const color = getComputedStyle(one).backgroundColor;
            return rgb(color)[3] === 0 ? behind(one.parentElement) : color;
        };
        return [...document.querySelectorAll('body *')].filter((one) => one.checkVisibility()).filter((one) => {
            const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => b - a);
            return one.innerText && (a + .05) / (b + .05) < 4.5;
        }).map((one) => one.outerHTML);
    })()""")
    assert poor == []


def test_the_page_and_the_server_understand_each_other(the_page, scripted):
    scripted.engine.says = lambda request: "<think>\nlow\n</think>\n\n**newest**"
    page = Page(the_page.browser, None, f"{scripted.url}/")
    page.open()
    page.wait("document.title === 'tiny'")
    page.fill("temperature", "0.25")
    page.run("document.querySelector('#draft').focus()")
    page.type("wider")
    page.key("Enter")
    page.wait("document.querySelector('.note')?.innerText.includes('tokens/s')")
    assert page.texts(".assistant .text") == ["newest"] and page.texts(".thought summary") != []
    [request] = scripted.engine.asked
    assert request.sampling.temperature == 0.25 and "wider" in scripted.engine.tokenizer.decode(request.prompt)
    assert page.faults() == []
