// Who answers a view: the server of its page, or the kernel of its notebook. Both know the same paths.

const KERNEL_SECONDS = 30;

function read(status, text) {
  const answer = status === 204 ? null : JSON.parse(text);
  if (status >= 400) throw Object.assign(new Error(answer.error), { status });
  return answer;
}

export class PageServer {
  // What is there; with a body, a change. Fails with the server's words and status.
  async ask(path, body) {
    const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      throw new Error("No answer: is `jaxcls annotate` still running, and the connection to it open? Nothing was changed.");
    }
    return read(response.status, await response.text());
  }

  // The address of a picture, now or later.
  picture(path) {
    return path;
  }
}

// One for each view: all views of a widget hear all answers.
export class KernelServer {
  constructor(model) {
    Object.assign(this, { model, name: Math.random(), count: 0, waiting: new Map() });
    this.hear = ({ id, status }, [body]) => {
      this.waiting.get(id)?.({ status, body });
      this.waiting.delete(id);
    };
    model.on("msg:custom", this.hear);
  }

  close() {
    this.model.off("msg:custom", this.hear);
  }

  request(path, body = null) {
    this.count += 1;
    const id = `${this.name}-${this.count}`;
    return new Promise((resolve) => {
      this.waiting.set(id, resolve);
      this.model.send({ id, path, body });
    });
  }

  // A kernel that is busy answers later: only the view stops waiting.
  async ask(path, body) {
    const silence = new Promise((_, reject) => setTimeout(reject, 1000 * KERNEL_SECONDS,
      new Error("The notebook's kernel does not answer: it is busy, or has ended. Refresh shows what holds.")));
    const answer = await Promise.race([this.request(path, body), silence]);
    return read(answer.status, new TextDecoder().decode(answer.body));
  }

  async picture(path) {
    const { status, body } = await this.request(path);
    if (status !== 200) throw new Error("no picture");
    return URL.createObjectURL(new Blob([body]));
  }
}
