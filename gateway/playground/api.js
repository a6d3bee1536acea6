// The public REST API, and nothing else. Knows nothing of the page.

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, param, requestId });
  }
}

export class Api {
  #key = "";
  #askForKey;
  #waiting = null;

  // `askForKey(refused)` resolves to a key; called when the gateway wants one.
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  async models() {
    return (await this.#json("GET", "v1/models")).data;
  }

  // "ready", "degraded" or "unavailable".
  async health() {
    const reply = await fetch(here("readyz"));
    return (await reply.json()).status;
  }

  async samples() {
    const reply = await fetch(here("playground/samples/index.json"));
    return reply.ok ? (await reply.json()).samples : [];
  }

  upload(file, signal) {
    const form = new FormData();
    form.append("file", file, "image");
    return this.#json("POST", "v1/images", { body: form, signal });
  }

  erase(image) {
    return this.#json("DELETE", `v1/images/${image}`);
  }

  async ask(image, questions, options) {
    const body = { questions, ...options };
    return (await this.#json("POST", `v1/images/${image}/questions`, { json: body })).answers;
  }

  // Yields answers in order of completion.
  askAll(image, questions, options, signal) {
    const body = { questions, stream: true, ...options };
    return this.#events(`v1/images/${image}/questions`, body, signal);
  }

  // Yields chunks of a chat completion.
  chat(image, question, options, signal) {
    const part = { type: "image_url", image_url: { url: `lookonce:${image}` } };
    const messages = [{ role: "user", content: [part, { type: "text", text: question }] }];
    const body = { messages, stream: true, stream_options: { include_usage: true }, ...options };
    return this.#events("v1/chat/completions", body, signal);
  }

  async #json(method, path, options) {
    const reply = await this.#send(method, path, options);
    return reply.json();
  }

  async *#events(path, json, signal) {
    const reply = await this.#send("POST", path, { json, signal });
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new ApiError("The connection ended before the answer did.");
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          if (!line.startsWith("data: ")) continue;
          if (line === "data: [DONE]") return;
          const event = JSON.parse(line.slice(6));
          if (event.error && !("id" in event)) throw new ApiError(event.error.message, event.error);
          yield event;
        }
      }
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  async #send(method, path, { json, body, signal } = {}) {
    for (;;) {
      const headers = {};
      if (this.#key) headers.authorization = `Bearer ${this.#key}`;
      if (json) headers["content-type"] = "application/json";
      const payload = json ? JSON.stringify(json) : body;
      let reply;
      try {
        reply = await fetch(here(path), { method, headers, body: payload, signal });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The gateway can't be reached.");
      }
      if (reply.ok) return reply;
      if (reply.status !== 401) throw await refusal(reply);
      await this.#renewKey();
    }
  }

  // Requests that were refused together wait for one key together.
  async #renewKey() {
    this.#waiting ??= this.#askForKey(Boolean(this.#key)).finally(() => { this.#waiting = null; });
    this.#key = await this.#waiting;
  }
}

// Relative to the page, so that the gateway may live under a path.
function here(path) {
  return new URL(path, document.baseURI);
}

async function refusal(reply) {
  const { error = {} } = await reply.json().catch(() => ({}));
  const message = error.message ?? `HTTP ${reply.status} without an explanation`;
  const requestId = reply.headers.get("x-request-id");
  return new ApiError(message, { status: reply.status, code: error.code, param: error.param, requestId });
}
