// Markdown as models write it, as nodes. What a model writes becomes text nodes and nothing else: there is no
// innerHTML here, and the tests load the page under a policy that forbids it. Every step is linear in the text, or
// nearly: a model may write anything, and it is read again with every token.

const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|(\d{1,9})[.)])(?:( +)(.*))?$/;
const TABLE_RULE = /^\|?(?: *:?-+:? *\|)* *(?::?-+:? *)?$/;
const MATH = { "\\[": "\\]", "\\(": "\\)", $$: "$$" };
// Quotes and lists within each other: deeper ones are shown as they are written.
const MOST_NESTED = 8;
const FORMULA_LINES = 100;

/** Shows `text` in `target`. Blocks that are there already stay: a selection in them outlives the next token. */
export function render(target, text) {
  const found = blocks(text.split(/\r?\n/));
  let kept = 0;
  while (kept < found.length && target.childNodes[kept]?.source === found[kept].source) kept += 1;
  while (target.childNodes.length > kept) target.lastChild.remove();
  for (const { source, build } of found.slice(kept)) target.append(Object.assign(build(), { source }));
}

/** The blocks of `lines`, each with its source and a function that makes its node. */
function blocks(lines, depth = 0) {
  const found = [];
  const kinds = depth < MOST_NESTED ? [...KINDS, paragraph] : [paragraph];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const { end, build } = kinds.find((kind) => kind.begins(lines, at)).read(lines, at, depth);
    found.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return found;
}

const fence = {
  begins: (lines, at) => FENCE.test(lines[at]),
  read(lines, at) {
    const [, indent, mark, info] = FENCE.exec(lines[at]);
    let end = at + 1;
    while (end < lines.length && !closes(lines[end].trim(), mark)) end += 1;
    const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent.length, indentOf(line))));
    const build = () => codeBlock(code.join("\n"), info.trim().split(/\s/)[0]);
    return { end: Math.min(end + 1, lines.length), build };
  },
};

const closes = (line, mark) => line.length >= mark.length && line === mark[0].repeat(line.length);

function codeBlock(code, language) {
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.dataset.do = "copy-code";
  const bar = element("div", element("span", language), copy);
  bar.className = "bar";
  const pre = element("pre", element("code", code));
  pre.tabIndex = 0; // so that the keys can scroll it
  const block = element("div", bar, pre);
  block.className = "code";
  return block;
}

// Formulas are shown as they are written: one has no empty line, and no more lines than FORMULA_LINES.
const formula = {
  begins: (lines, at) => formula.end(lines, at) !== null,
  end(lines, at) {
    const first = lines[at].trim();
    const close = first.startsWith("\\[") || first.startsWith("$$") ? MATH[first.slice(0, 2)] : null;
    if (close === null) return null;
    if (first.slice(2).includes(close)) return first.slice(2).endsWith(close) ? at + 1 : null;
    const line = lines.slice(at + 1, at + FORMULA_LINES).findIndex((line) => !line.trim() || line.includes(close));
    return line >= 0 && lines[at + 1 + line].includes(close) ? at + line + 2 : null;
  },
  read(lines, at) {
    const end = formula.end(lines, at);
    return { end, build: () => mathNode("div", lines.slice(at, end).join("\n").trim()) };
  },
};

function mathNode(name, text) {
  const node = element(name, text);
  node.className = "math";
  return node;
}

const heading = {
  begins: (lines, at) => HEADING.test(lines[at]),
  read(lines, at) {
    const [, marks, text] = HEADING.exec(lines[at]);
    const level = Math.min(marks.length + 1, 6); // the page's own title is the first
    return { end: at + 1, build: () => element(`h${level}`, inline(text.replace(/ #+ *$/, ""))) };
  },
};

const rule = {
  begins: (lines, at) => RULE.test(lines[at]),
  read: (lines, at) => ({ end: at + 1, build: () => element("hr") }),
};

const quote = {
  begins: (lines, at) => QUOTE.test(lines[at]),
  read(lines, at, depth) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
    return { end, build: () => element("blockquote", ...built(inner, depth)) };
  },
};

const table = {
  begins(lines, at) {
    const marks = lines[at + 1]?.trim() ?? "";
    if (!lines[at].includes("|") || !marks.includes("-") || !TABLE_RULE.test(marks)) return false;
    return cells(lines[at]).length === cells(marks).length;
  },
  read(lines, at) {
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|")) end += 1;
    return { end, build: () => tableNode(lines.slice(at, end).map(cells)) };
  },
};

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function tableNode([names, marks, ...rows]) {
  const align = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : ""));
  const row = (name, texts) => element("tr", ...names.map((_, column) => {
    const cell = element(name, inline(texts[column] ?? ""));
    cell.style.textAlign = align[column] ?? "";
    return cell;
  }));
  const body = rows.map((texts) => row("td", texts));
  const block = element("div", element("table", element("thead", row("th", names)), element("tbody", ...body)));
  block.className = "table";
  return block;
}

const list = {
  begins: (lines, at) => ITEM.test(lines[at]),
  read(lines, at, depth) {
    const [, indent, , number] = ITEM.exec(lines[at]);
    const items = [];
    let end = at;
    for (let item; (item = ITEM.exec(lines[end] ?? "")) && siblings(item, indent, number); ) {
      const [inner, next] = readItem(lines, end, item);
      items.push(inner);
      end = next;
    }
    const build = () => {
      const name = number === undefined ? "ul" : "ol";
      const node = element(name, ...items.map((inner) => element("li", ...built(inner, depth))));
      if (number !== undefined) node.start = Number(number);
      return node;
    };
    return { end, build };
  },
};

const siblings = (item, indent, number) =>
  Math.abs(item[1].length - indent.length) < 2 && (item[3] === undefined) === (number === undefined);

/** The lines of one item without their indent, and where the next begins. Two spaces or more indent, as models do. */
function readItem(lines, at, [, indent, mark, , spaces = " ", first = ""]) {
  const inner = [first];
  const width = indent.length + mark.length + Math.min(spaces.length, 4);
  let end = at + 1;
  for (let blank = 0; end + blank < lines.length; ) {
    const line = lines[end + blank].replace(/^\t+/, (tabs) => "    ".repeat(tabs.length));
    const within = indentOf(line) >= indent.length + 2;
    if (!line.trim()) {
      blank += 1;
    } else if (within || (!blank && !KINDS.some((kind) => kind.begins(lines, end)))) {
      inner.push(...Array(blank).fill(""), line.slice(Math.min(width, indentOf(line))));
      end += blank + 1;
      blank = 0;
    } else {
      // An empty line between two items separates nothing.
      return [inner, ITEM.test(line) ? end + blank : end];
    }
  }
  return [inner, end];
}

const paragraph = {
  begins: () => true,
  read(lines, at) {
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && !KINDS.some((kind) => kind.begins(lines, end))) end += 1;
    const text = lines.slice(at, end).map((line) => line.trim());
    return { end, build: () => element("p", inline(text.join("\n"))) };
  },
};

const KINDS = [fence, formula, heading, rule, quote, table, list];

const built = (lines, depth) => blocks(lines, depth + 1).map(({ build }) => build());

const indentOf = (line) => line.length - line.trimStart().length;

function element(name, ...content) {
  const node = document.createElement(name);
  node.append(...content);
  return node;
}

const TOKEN = /\\[\s\S]|`+|\*+|_+|~+|!?\[|<|https?:\/\/|\$\$|\n/g;
const LINK = /!?\[([^[\]]{0,1000})\]\(<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?: +"[^"\n]*")?\)/y;
const BARE = /https?:\/\/[\w\-.~:/?#@!$&'()*+,;=%]{1,2000}/y;
const ANGLED = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const BREAK = /<br *\/?>/y;
const NAMES = { "*": "em", "**": "strong", _: "em", __: "strong", "~~": "del" };

/** Code, formulas, links, emphasis and line ends of one run of text. */
function inline(text, links = true) {
  const emphasis = new Emphasis();
  const missing = new Set(); // marks with no partner in the rest of the text
  let at = 0;
  while (at < text.length) {
    TOKEN.lastIndex = at;
    const token = TOKEN.exec(text);
    emphasis.put(text.slice(at, token?.index));
    if (!token) break;
    at = token.index;
    const found = matched(text, at, token[0], links, missing);
    if (found) {
      emphasis.put(found.node);
      at = found.end;
    } else {
      emphasis.mark(token[0], text[at - 1] ?? " ", text[at + token[0].length] ?? " ");
      at += token[0].length;
    }
  }
  return emphasis.close();
}

/** What begins with `token` at `at`, as a node and its end; nothing where it is only text, or a mark of emphasis. */
function matched(text, at, token, links, missing) {
  const after = at + token.length;
  if (token === "\n") return { node: element("br"), end: after };
  if (token[0] === "`") {
    const end = missing.has(token) ? -1 : partner(text, token, after);
    if (end < 0) return void missing.add(token);
    return { node: element("code", text.slice(after, end).replace(/^ (.*) $/s, "$1")), end: end + token.length };
  }
  if (token in MATH) {
    const end = missing.has(token) ? -1 : text.indexOf(MATH[token], after);
    if (end < 0) return void missing.add(token);
    return { node: mathNode("span", text.slice(at, end + 2)), end: end + 2 };
  }
  if (token[0] === "\\") return /[!-/:-@[-`{-~]/.test(token[1]) ? { node: token[1], end: after } : undefined;
  if (!links && token !== "<") return undefined;
  if (token.endsWith("[")) {
    const [whole, label, address] = match(LINK, text, at) ?? [];
    return whole && linked(address, inline(label, false), at + whole.length);
  }
  if (token === "<") {
    const [line] = match(BREAK, text, at) ?? [];
    if (line) return { node: element("br"), end: at + line.length };
    const [whole, address] = (links && match(ANGLED, text, at)) || [];
    return whole && linked(address, address, at + whole.length);
  }
  if (token.startsWith("http")) {
    const address = trimmed(match(BARE, text, at)?.[0] ?? token);
    return linked(address, address, at + address.length);
  }
  return undefined;
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** Where the next run of exactly these backticks begins, or -1. */
function partner(text, ticks, from) {
  for (let at = text.indexOf(ticks, from); at >= 0; ) {
    let end = at;
    while (text[end] === "`") end += 1;
    if (end - at === ticks.length) return at;
    at = text.indexOf(ticks, end);
  }
  return -1;
}

/** Only addresses of the web become links; nothing else of a model's is ever loaded or run, pictures neither. */
function linked(address, label, end) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (url?.protocol !== "https:" && url?.protocol !== "http:") return undefined;
  const node = element("a", label);
  Object.assign(node, { href: url.href, target: "_blank", rel: "noopener noreferrer" });
  return { node, end };
}

/** A bare address without what ends the sentence it stands in. */
function trimmed(address) {
  let end = address.length;
  while (/[.,;:!?'*_~\])]/.test(address[end - 1])) {
    if (address[end - 1] === ")" && address.includes("(")) break;
    end -= 1;
  }
  return address.slice(0, end);
}

/** Nodes between marks of emphasis; a mark without its partner is text again. */
class Emphasis {
  constructor() {
    this.frames = [{ mark: "", node: document.createDocumentFragment() }];
  }

  put(content) {
    if (content !== "") this.frames.at(-1).node.append(content);
  }

  /** Takes a run of marks, or any other text, between two characters. */
  mark(run, before, after) {
    const [char] = run;
    if (!(char in NAMES || run === "~~")) return this.put(run);
    // Within a word an underscore is part of a name, and a single star a product.
    const strict = char === "_" || run === "*";
    const outside = (other) => !strict || !/[\p{L}\p{N}]/u.test(other);
    let left = run.length;
    while (/\S/.test(before) && outside(after)) {
      const open = this.frames.findLastIndex(({ mark }) => mark[0] === char && mark.length <= left);
      if (open < 0) break;
      left -= this.frames[open].mark.length;
      this.end(open);
    }
    while (left && /\S/.test(after) && outside(before) && this.frames.length < 2 * MOST_NESTED) {
      const mark = char.repeat(Math.min(left, 2));
      if (!(mark in NAMES)) break;
      this.frames.push({ mark, node: document.createDocumentFragment() });
      left -= mark.length;
    }
    this.put(char.repeat(left));
  }

  /** Ends the emphasis of the frame at `open`; those within it found no partner. */
  end(open) {
    while (this.frames.length > open + 1) this.unwrap();
    const { mark, node } = this.frames.pop();
    this.put(element(NAMES[mark], node));
  }

  unwrap() {
    const { mark, node } = this.frames.pop();
    this.put(mark);
    this.put(node);
  }

  close() {
    while (this.frames.length > 1) this.unwrap();
    return this.frames[0].node;
  }
}
