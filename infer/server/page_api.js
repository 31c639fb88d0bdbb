// The routes of the server that the page is from, as any other client of its API calls them.

/** What went wrong, as one line for the user. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message.replace(/\s+/g, " ").trim().slice(0, 400));
    this.status = status;
  }
}

const NO_ANSWER = "The server does not answer.";
const BROKEN = "The connection broke before the answer was complete.";

/** Ids of the models that are served. */
export async function listModels(key) {
  const response = await call("v1/models", key, {});
  const models = parsed(await response.text())?.data;
  if (!Array.isArray(models)) throw new Failure("The server lists no models.");
  return models.map((model) => model.id);
}

/** Chunks of the answer to `request`, as they come. Throws a Failure, or an AbortError once `signal` says so. */
export async function* streamChat(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await call("v1/chat/completions", key, { method: "POST", body, signal });
  for await (const data of events(response.body.getReader())) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk === undefined) throw new Failure("The server sent something that is no part of an answer.");
    if (chunk.error) throw new Failure(chunk.error.message ?? "The server failed.");
    yield chunk;
  }
  throw new Failure(BROKEN);
}

async function call(path, key, options) {
  // A header is made of bytes: the browser takes each character for one.
  const bytes = String.fromCharCode(...new TextEncoder().encode(key));
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${bytes}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Failure(NO_ANSWER);
  });
  if (!response.ok) throw failure(response, await response.text());
  return response;
}

function failure({ status, statusText, headers }, body) {
  const said = parsed(body)?.error?.message ?? `The server failed: ${status} ${statusText}`;
  const wait = headers.get("Retry-After");
  return new Failure(/^\d+$/.test(wait ?? "") ? `${said} Try again in ${wait} s.` : said, status);
}

/** The data of server-sent events; a comment, which keeps a connection alive, has none. */
async function* events(reader) {
  const decoder = new TextDecoder();
  try {
    for (let held = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      const complete = (held + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      held = complete.pop();
      for (const event of complete) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trim()).join("\n");
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure(BROKEN);
  } finally {
    reader.cancel().catch(() => {}); // of an answer that nobody reads any more
  }
}

/** `text` as JSON; undefined for anything but an object. */
function parsed(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : undefined;
  } catch {
    return undefined;
  }
}
