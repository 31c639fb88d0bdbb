// One message: as the API has it, and as the page shows it.

import { render } from "./page_markdown.js";

const ROLES = ["system", "user", "assistant", "tool"];

/** Text of a message's content, which may be in parts. */
export function textOf(content) {
  return typeof content === "string" ? content : (content ?? []).map((part) => part.text).join("");
}

/** The messages in `text`: an object {"messages": [...]} in JSON. Throws an Error of one line for anything else. */
export function readChat(text) {
  let messages;
  try {
    messages = JSON.parse(text)?.messages;
  } catch {
    throw new Error("This is not JSON; a chat is one object {\"messages\": [...]}.");
  }
  if (!Array.isArray(messages)) throw new Error("This file has no chat; one object {\"messages\": [...]} is wanted.");
  const wrong = messages.findIndex((message) => !isMessage(message));
  if (wrong >= 0) throw new Error(`Message ${wrong + 1} of this file is none: a role and a text are wanted.`);
  return messages;
}

function isMessage(message) {
  if (!ROLES.includes(message?.role)) return false;
  const { content, reasoning_content: thought, tool_calls: calls } = message;
  const parts = content ?? [];
  return (
    (typeof parts === "string" || (Array.isArray(parts) && parts.every((part) => typeof part?.text === "string"))) &&
    (thought == null || typeof thought === "string") &&
    (calls == null || (Array.isArray(calls) && calls.every((call) => typeof call?.function?.name === "string")))
  );
}

const newCall = (id) => ({ id, type: "function", function: { name: "", arguments: "" } });

/** A message with its element. `note` is the line below an answer, `seconds` how long its thought took. */
export class Turn {
  constructor(message, { note = "", seconds = null } = {}) {
    Object.assign(this, { message, note, seconds, busy: false, error: "", began: null, ended: null });
    const template = ["user", "assistant"].includes(message.role) ? message.role : "other";
    this.element = document.getElementById(template).content.firstElementChild.cloneNode(true);
    this.draw();
  }

  /** Whether there is anything in it that a model could read. */
  get isEmpty() {
    const { content, reasoning_content: thought, tool_calls: calls } = this.message;
    return !textOf(content) && !thought && !calls?.length;
  }

  get text() {
    return textOf(this.message.content);
  }

  /** Adds what one more chunk of an answer brings. */
  take({ content, reasoning_content: thought, tool_calls: calls }) {
    if (!content && !thought && !calls?.length) return;
    const { message } = this;
    this.ended = performance.now();
    this.began ??= this.ended;
    if (thought) {
      message.reasoning_content = (message.reasoning_content ?? "") + thought;
      this.seconds = (this.ended - this.began) / 1000;
    }
    if (content) message.content += content;
    for (const piece of calls ?? []) {
      message.tool_calls ??= [];
      const call = (message.tool_calls[piece.index] ??= newCall(piece.id));
      call.function.name += piece.function?.name ?? "";
      call.function.arguments += piece.function?.arguments ?? "";
    }
  }

  draw() {
    const { role } = this.message;
    if (role === "user") this.#part(".text").textContent = this.text;
    else if (role === "assistant") this.#drawAnswer();
    else {
      this.#part(".text").textContent = this.text;
      const tool = this.message.name ?? "a tool";
      this.#part("summary").textContent = role === "tool" ? `Result of ${tool}` : "System prompt";
    }
  }

  #part(selector) {
    return this.element.querySelector(selector);
  }

  #drawAnswer() {
    const { reasoning_content: thought, tool_calls: calls } = this.message;
    this.element.ariaBusy = this.busy;
    this.#drawThought(thought ?? "");
    render(this.#part(".text"), this.text);
    (calls ?? []).forEach((call, index) => this.#drawCall(call, index));
    this.#part(".note").textContent = this.note;
    this.#part(".error").hidden = !this.error;
    this.#part(".error span").textContent = this.error;
  }

  /** Open while nothing else is there, then folded, unless the reader has folded or unfolded it. */
  #drawThought(thought) {
    const details = this.#part(".thought");
    const thinking = this.busy && !this.text && !this.message.tool_calls;
    details.hidden = !thought;
    details.onclick ??= () => (details.dataset.kept = "");
    if (!("kept" in details.dataset)) details.open = thinking;
    const took = this.seconds === null ? "Thought" : `Thought for ${seconds(this.seconds)}`;
    this.#part(".thought summary").textContent = thinking ? "Thinking" : took;
    render(this.#part(".thought .prose"), thought);
  }

  #drawCall({ function: called }, index) {
    const list = this.#part(".calls");
    if (!list.children[index]) list.append(document.getElementById("call").content.cloneNode(true));
    const { arguments: given } = called;
    list.children[index].querySelector("summary").textContent = called.name;
    list.children[index].querySelector("pre").textContent = typeof given === "string" ? given : JSON.stringify(given);
  }
}

export function seconds(value) {
  return value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}
