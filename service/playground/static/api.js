/** The requests that the page sends: the service's public API, and nothing else. */

/** An error to show: the title and detail of the service's problem object, or of what kept it from answering. */
export class Problem extends Error {
  constructor(title, detail, status = 0) {
    super(detail);
    this.title = title;
    this.detail = detail;
    this.status = status;
  }
}

export class Api {
  /** In memory alone: neither storage nor a cookie has it. */
  key = "";

  async models() {
    return (await (await this.#send("v1/models")).json()).data;
  }

  /** Stores `media` and returns its id, by which questions name it. */
  async upload(media, signal) {
    const response = await this.#send("v1/media", { method: "POST", body: media, signal });
    return (await response.json()).id;
  }

  /** Asks, calls `onText` with the answer so far as it grows, and returns the whole result. */
  async ask(question, onText, signal) {
    const response = await this.#send("v1/answer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...question, stream: true }),
      signal,
    });
    let text = "";
    for await (const { event, data } of events(response.body)) {
      if (event === "started") onText((text = "")); // once more after a lost worker: the text begins anew
      else if (event === "token") onText((text += data.text));
      else if (event === "completed") return data;
      else if (event !== "queued") throw new Problem(data?.title ?? event, data?.detail ?? "", data?.status);
    }
    throw new Problem("Connection lost", "The stream ended before the answer did. Ask again.");
  }

  async #send(path, options = {}) {
    const headers = { ...options.headers, ...(this.key && { Authorization: `Bearer ${this.key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("No connection", "The service cannot be reached. Is it still running?");
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function refusal(response) {
  const body = await response.text();
  const later = response.headers.get("Retry-After");
  const wait = later ? ` Try again in ${later} s.` : "";
  try {
    const { title, detail } = JSON.parse(body);
    const said = /again in \d/.test(detail);
    return new Problem(title, detail + (said ? "" : wait), response.status);
  } catch {
    return new Problem(`Error ${response.status}`, (body.slice(0, 300) || response.statusText) + wait, response.status);
  }
}

/** The server-sent events of `stream`, with their data parsed. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = block.split(/\r?\n/).filter((line) => line && !line.startsWith(":"));
        if (!fields.length) continue;
        const field = (name) =>
          fields.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trim());
        yield { event: field("event").join(""), data: JSON.parse(field("data").join("\n") || "null") };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // hanging up is what cancels the job
  }
}
