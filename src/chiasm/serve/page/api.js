// The server's side: models, streamed answers, and the two questions of this page.

export class Refused extends Error {
  /** What the server said. `again`: seconds after which it may go better, or null. */
  constructor(status, message, again = null) {
    super(message);
    this.status = status;
    this.again = again;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    const { error } = await response.json();
    if (error && typeof error.message === "string") message = error.message;
  } catch {
    // no JSON: the status says what there is to say
  }
  throw new Refused(response.status, message, Number(response.headers.get("Retry-After")) || null);
}

/** The names of the models. */
export async function models(key) {
  const response = await checked(await fetch("/v1/models", { headers: headers(key) }));
  return (await response.json()).data.map((model) => model.id);
}

/** One of the page's own questions. */
export async function ask(path, body, key, signal) {
  const response = await checked(
    await fetch(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal }),
  );
  return response.json();
}

/** The chunks of a streamed answer, as they come. Throws Refused. */
export async function* chat(body, key, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await checked(
    await fetch("/v1/chat/completions", { method: "POST", headers: headers(key), body: JSON.stringify(request), signal }),
  );
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(500, chunk.error.message || "the answer broke off");
    yield chunk;
  }
  throw new Refused(0, "the connection was lost before the answer ended");
}

/** The data of server-sent events. Comment lines are signs of life and carry nothing. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (!line && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
