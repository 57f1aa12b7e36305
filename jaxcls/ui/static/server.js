// Who answers a view: the server of its page, or the kernel of its notebook. Both know the same paths.

const KERNEL_SECONDS = 30;
const MAX_PICTURES = 6; // at once, as browsers ask a server

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

  // Fills an image.
  show(image, path) {
    image.src = path;
  }
}

// One for each view, whose images are within `root`: all views of a widget hear all answers.
export class KernelServer {
  constructor(model, root) {
    Object.assign(this, { model, root, name: Math.random(), count: 0, waiting: new Map(), wanted: [], numAsked: 0 });
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
    return new Promise((resolve, reject) => {
      this.waiting.set(id, resolve);
      try {
        this.model.send({ id, path, body });
      } catch {
        reject(new Error("The notebook's kernel has ended, or was started anew: run the cell again. Nothing was changed."));
      }
    });
  }

  // A kernel that is busy answers later: only the view stops waiting.
  async ask(path, body) {
    const silence = new Promise((_, reject) => setTimeout(reject, 1000 * KERNEL_SECONDS,
      new Error("The notebook's kernel does not answer: it is busy, or has stopped. Refresh shows what holds.")));
    const answer = await Promise.race([this.request(path, body), silence]);
    return read(answer.status, new TextDecoder().decode(answer.body));
  }

  // What is wanted at once goes first. The image finds its place in the view only after this.
  show(image, path) {
    this.wanted[image.fetchPriority === "high" ? "unshift" : "push"]({ image, path });
    queueMicrotask(() => this.showWanted());
  }

  // Images that were scrolled or turned away in the meantime are left out: the kernel would be busy for long.
  async showWanted() {
    while (this.wanted.length > 0 && this.numAsked < MAX_PICTURES) {
      const { image, path } = this.wanted.shift();
      if (!this.root.contains(image)) continue;
      this.numAsked += 1;
      await this.fill(image, path);
      this.numAsked -= 1;
    }
  }

  async fill(image, path) {
    const answer = await this.request(path).catch(() => ({ status: null }));
    if (answer.status !== 200) {
      image.dispatchEvent(new Event("error"));
      return;
    }
    const address = URL.createObjectURL(new Blob([answer.body]));
    for (const event of ["load", "error"]) {
      image.addEventListener(event, () => URL.revokeObjectURL(address), { once: true });
    }
    image.loading = "eager"; // a lazy one that is turned away would never load
    image.src = address;
  }
}
