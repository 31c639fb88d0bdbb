// The chat page: a list of turns, the answer that is coming, and what of both is kept in the browser.

import { Failure, listModels, streamChat } from "./page_api.js";
import { Turn, readChat, seconds, textOf } from "./page_turn.js";

const $ = (id) => document.getElementById(id);
const fields = $("settings").elements;

let turns = [];
let answering = null; // AbortController of the answer that is coming
let following = true; // whether the newest line stays in sight

// The chat

function add(turn) {
  turns.push(turn);
  $("log").append(turn.element);
  return turn;
}

/** Takes the turns from `index` on out of the chat. */
function cut(index) {
  for (const turn of turns.splice(index)) turn.element.remove();
}

function send(text) {
  if (!text.trim() || answering || !settingsAreValid()) return false;
  add(new Turn({ role: "user", content: text }));
  answer();
  return true;
}

/** Answers the last message anew. */
function again() {
  if (answering || !settingsAreValid()) return;
  if (turns.at(-1)?.message.role === "assistant") cut(turns.length - 1);
  answer();
}

async function answer() {
  const abort = (answering = new AbortController());
  const messages = chat();
  const turn = add(new Turn({ role: "assistant", content: "" }));
  const asked = performance.now();
  let usage, reason;
  following = true;
  tell(null);
  showBusy(turn, true);
  try {
    if (!$("model").value) await showModels();
    const request = { model: $("model").value, messages, ...parameters() };
    for await (const chunk of streamChat(request, fields.key.value, abort.signal)) {
      usage = chunk.usage ?? usage;
      reason = chunk.choices?.[0]?.finish_reason ?? reason;
      turn.take(chunk.choices?.[0]?.delta ?? {});
      drawSoon(turn);
    }
  } catch (error) {
    if (abort.signal.aborted) reason = "stopped";
    else turn.error = oneLine(error);
    if (error.status === 401) askForKey();
  }
  turn.note = summary(turn, usage, reason, asked);
  answering = null;
  showBusy(turn, false);
  saveChat();
}

function stop() {
  answering?.abort();
}

/** What the model reads: the system prompt, and every turn with something in it. */
function chat() {
  const system = fields.system.value.trim() ? [{ role: "system", content: fields.system.value }] : [];
  return [...system, ...rows().map((row) => row.message)];
}

/** The turns as they are kept. */
function rows() {
  return turns.filter((turn) => !turn.isEmpty).map(({ message, note, seconds }) => ({ message, note, seconds }));
}

function replace(kept) {
  stop();
  cut(0);
  for (const row of kept) add(new Turn(row.message, row));
  following = true;
  follow();
}

/** Begins another chat; one click brings back the one before. */
function begin(kept, system, message) {
  const before = [rows(), fields.system.value];
  const change = (rows, system) => {
    replace(rows);
    fields.system.value = system;
    saveChat();
    saveSettings();
    $("draft").focus();
  };
  change(kept, system);
  tell(message, before[0].length ? "Undo" : null, () => {
    change(...before);
    tell(null);
  });
}

// Settings

/** Parameters of the API that have a value; their names are those of the fields. */
function parameters() {
  const numbers = [...fields].filter((field) => field.type === "number" && field.value !== "");
  const given = Object.fromEntries(numbers.map((field) => [field.name, field.valueAsNumber]));
  const thinking = fields.thinking.value;
  return { ...given, ...(thinking && { chat_template_kwargs: { enable_thinking: thinking === "on" } }) };
}

function settingsAreValid() {
  if ($("settings").checkValidity()) return true;
  openSettings();
  return $("settings").reportValidity();
}

function openSettings() {
  if (!$("panel").open) $("panel").showModal();
}

function askForKey() {
  const line = fields.key.value ? "The server does not take this API key." : "The server wants an API key.";
  tell(line, "Enter key", () => {
    openSettings();
    fields.key.focus();
  });
}

async function showModels() {
  const ids = await listModels(fields.key.value);
  const chosen = $("model").value || kept("localStorage", "model");
  $("model").replaceChildren(...ids.map((id) => new Option(id, id)));
  if (ids.includes(chosen)) $("model").value = chosen;
  document.title = $("model").value;
}

/** Asks the server for its models, and says so where it gives none. */
async function connect() {
  try {
    await showModels();
  } catch (error) {
    if (error.status === 401) askForKey();
    else tell(oneLine(error), "Retry", reconnect);
  }
}

function reconnect() {
  tell(null);
  connect();
}

// What is kept in the browser: chat and settings in localStorage, the key for as long as the tab is open

function kept(place, name) {
  try {
    return JSON.parse(window[place].getItem(name));
  } catch {
    return null; // a browser may forbid it
  }
}

function keep(place, name, value) {
  try {
    window[place].setItem(name, JSON.stringify(value));
  } catch {
    tell("This browser cannot keep the chat: export it before you leave.", "Export", exportChat);
  }
}

function saveChat() {
  keep("localStorage", "chat", rows());
}

function saveSettings() {
  const { key, ...values } = Object.fromEntries(new FormData($("settings")));
  keep("sessionStorage", "key", key);
  keep("localStorage", "settings", values);
  if ($("model").value) keep("localStorage", "model", $("model").value);
}

function restore() {
  for (const [name, value] of Object.entries(kept("localStorage", "settings") ?? {})) {
    if (fields[name]) fields[name].value = value;
  }
  fields.key.value = kept("sessionStorage", "key") ?? "";
  const rows = kept("localStorage", "chat") ?? [];
  try {
    readChat(JSON.stringify({ messages: rows.map((row) => row.message) }));
    replace(rows);
  } catch (error) {
    tell(`The chat kept in this browser cannot be read. ${error.message}`);
  }
}

/** One line of JSON, as `python -m infer chat` saves a chat and as training reads it. */
function exportChat() {
  const file = new Blob([`${JSON.stringify({ messages: chat() })}\n`], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `chat-${new Date().toISOString().slice(0, 16).replace(/[T:]/g, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function importChat() {
  const [file] = $("file").files;
  $("file").value = ""; // so that the same file can be chosen again
  $("panel").close();
  try {
    const messages = readChat(await file.text());
    const system = messages[0]?.role === "system" ? textOf(messages.shift().content) : "";
    begin(messages.map((message) => ({ message })), system, `${file.name} is open.`);
  } catch (error) {
    tell(error.message);
  }
}

// What is seen

let toDraw = null; // the turn that changed since the last frame

function drawSoon(turn) {
  const isAsked = toDraw !== null;
  toDraw = turn;
  if (isAsked) return;
  requestAnimationFrame(() => {
    toDraw?.draw();
    toDraw = null;
    follow();
  });
}

function showBusy(turn, busy) {
  toDraw = null;
  turn.busy = busy;
  turn.draw();
  document.body.classList.toggle("busy", busy);
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("status").textContent = busy ? "The model is answering." : turn.error ? "" : "The answer is complete.";
  follow();
}

function follow() {
  if (following) $("scroll").scrollTop = $("scroll").scrollHeight;
}

/** One line above the message field, with a button where there is something to do; null takes it away. */
function tell(message, label = null, act = null) {
  const [line, button] = $("notice").children;
  $("notice").hidden = message === null;
  line.textContent = message;
  button.hidden = label === null;
  button.textContent = label;
  button.onclick = act;
}

const oneLine = (error) => (error instanceof Failure ? error.message : `The page failed: ${error.message}`);

/** The line below an answer: how it ended, how long it is and how fast it came. */
function summary(turn, usage, reason, asked) {
  const parts = [];
  if (reason === "stopped") parts.push("stopped");
  if (reason === "length") parts.push("cut: no more tokens were allowed");
  if (usage) {
    const { prompt_tokens: read, completion_tokens: made, prompt_tokens_details: details } = usage;
    parts.push(`${made} tokens`);
    // The first token is the prompt's work, the others come one after the other.
    const rate = ((made - 1) * 1000) / (turn.ended - turn.began);
    if (made > 1 && isFinite(rate)) parts.push(`${rate.toFixed(1)} tokens/s`);
    if (turn.began) parts.push(`first after ${seconds((turn.began - asked) / 1000)}`);
    parts.push(`prompt ${read} tokens${details?.cached_tokens ? `, ${details.cached_tokens} cached` : ""}`);
  }
  return parts.join(" · ");
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyInsecurely(text); // plain HTTP from another machine has no clipboard
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function copyInsecurely(text) {
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

// What is done

const ACTIONS = {
  again,
  copy: (turn, button) => copy(turn.text, button),
  "copy-code": (turn, button) => copy(button.closest(".code").querySelector("code").textContent, button),
  edit(turn) {
    edit(turn, true);
    const field = turn.element.querySelector("textarea");
    field.value = turn.text;
    field.focus();
  },
  cancel: (turn) => edit(turn, false),
};

function edit(turn, open) {
  turn.element.querySelector(".editor").hidden = !open;
  for (const part of [".text", ".actions"]) turn.element.querySelector(part).hidden = open;
}

function turnOf(element) {
  return turns.find((turn) => turn.element.contains(element));
}

$("log").addEventListener("click", ({ target }) => {
  const button = target.closest("button[data-do]");
  if (button) ACTIONS[button.dataset.do](turnOf(button), button);
});

$("log").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = event.target.querySelector("textarea").value;
  if (!text.trim() || answering || !settingsAreValid()) return;
  cut(turns.indexOf(turnOf(event.target)));
  send(text);
  $("draft").focus();
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (send($("draft").value)) $("draft").value = "";
});

document.addEventListener("keydown", (event) => {
  // While an input method composes, Enter picks a word.
  if (event.isComposing || $("panel").open) return;
  if (event.key === "Enter" && !event.shiftKey && event.target.matches("#draft, .editor textarea")) {
    event.preventDefault();
    event.target.form.requestSubmit();
  } else if (event.key === "Escape") {
    const editor = event.target.closest?.(".editor");
    if (editor) edit(turnOf(editor), false);
    else stop();
  }
});

$("scroll").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  following = scrollHeight - scrollTop - clientHeight < 48;
  $("latest").hidden = following;
});

$("latest").addEventListener("click", () => {
  following = true;
  follow();
});

$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => begin([], fields.system.value, turns.length ? "This is a new chat." : null));
$("open").addEventListener("click", () => openSettings());
$("export").addEventListener("click", exportChat);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", importChat);
$("model").addEventListener("change", saveSettings);
$("panel").addEventListener("click", ({ target }) => target === $("panel") && $("panel").close());
$("panel").addEventListener("close", () => $("draft").focus());
$("settings").addEventListener("change", saveSettings);
fields.key.addEventListener("change", reconnect);
// Only then is there anything that is not saved: a page that lies idle must not write over another's chat.
window.addEventListener("pagehide", () => answering && saveChat());

restore();
connect();
