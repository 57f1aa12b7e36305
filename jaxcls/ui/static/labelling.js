// The photos of a folder with their labels. Edits hold once the server says so; it alone decides whether they do.

export const NO_LABEL = "/unlabelled";
export const TRASH = "/trash";
const TITLES = new Map([[NO_LABEL, "no label"], [TRASH, "trash"]]);

export function titleOf(label) {
  return TITLES.get(label) ?? label;
}

export class Labelling {
  constructor(payload, server) {
    Object.assign(this, { server, classes: [], groups: null, listeners: [], last: Promise.resolve() });
    this.take(payload);
  }

  // Classes keep their order, and with it their keys, as long as the page is open.
  take({ names, labels, folders, suggested, predicted, ...rest }) {
    Object.assign(this, rest);
    const named = (positions) => positions.map((position) => names[position] ?? null);
    this.labels = named(labels);
    this.folders = named(folders);
    this.suggested = named(suggested);
    this.predicted = named(predicted);
    this.places = new Map(this.ids.map((id, i) => [id, i]));
    names.forEach((name) => this.addClass(name));
  }

  addClass(name) {
    if (!this.classes.includes(name) && !TITLES.has(name)) this.classes.push(name);
  }

  listen(listener) {
    this.listeners.push(listener);
  }

  tell(what) {
    for (const listener of this.listeners) listener(what);
  }

  // One thing after the other, so that each is made against what came of the one before.
  enqueue(work) {
    this.last = this.last.then(work, work).catch(async (error) => {
      if (error.status === 409) await this.sync();
      this.tell({ problem: error.message });
    });
    return this.last;
  }

  edit(photos, label) {
    return this.enqueue(async () => {
      const changes = photos.filter((id) => this.places.has(id) && this.labelOf(id) !== label)
        .map((id) => [id, this.labelOf(id), label]);
      if (changes.length === 0) return;
      const answer = await this.server.ask("edit", { changes });
      this.addClass(label);
      await this.follow(answer, `${changes.length === 1 ? changes[0][0] : `${changes.length} photos`}: ${titleOf(label)}`);
    });
  }

  undo() {
    return this.enqueue(async () => {
      if (this.undoable) await this.follow(await this.server.ask("undo", { seq: this.undoable }), "Undone");
    });
  }

  redo() {
    return this.enqueue(async () => {
      if (this.redoable) await this.follow(await this.server.ask("redo", { seq: this.redoable }), "Done again");
    });
  }

  async follow({ changes, seq, ...rest }, done) {
    const hasMissed = seq !== this.seq + 1;
    Object.assign(this, rest, { seq });
    for (const [id, label] of changes) this.labels[this.places.get(id)] = label;
    if (hasMissed) await this.sync(-1);
    this.tell({ done, changed: changes.map(([id]) => id) });
  }

  // What other pages did meanwhile.
  async sync(known = this.seq) {
    const state = await this.server.ask(`state?seq=${known}`);
    if (state === null || state.seq < this.seq) return; // older than what an edit has told since it was asked for
    const before = this.ids.join("\n");
    this.take(state);
    if (before !== this.ids.join("\n")) this.groups = null;
    this.tell({ changed: this.ids, areOthers: before !== this.ids.join("\n") });
  }

  async findDuplicates() {
    for (;;) {
      const { groups } = await this.server.ask("duplicates");
      if (groups !== null) {
        this.groups = groups;
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }

  labelOf(id) {
    return this.labels[this.places.get(id)];
  }

  numChanged() {
    return this.labels.filter((label, i) => label !== this.folders[i]).length;
  }
}

export const FILTERS = {
  all: ["all photos", (photos, i) => photos.labels[i] !== TRASH],
  unlabelled: ["without a label", (photos, i) => photos.labels[i] === NO_LABEL],
  wrong: ["probably mislabelled", (photos, i) => photos.doubts?.[i] > 0.5 && photos.labels[i] !== TRASH],
  disagree: ["the classifier sees another class", (photos, i) =>
    photos.predicted[i] !== null && photos.predicted[i] !== photos.labels[i] && photos.labels[i] !== TRASH],
  duplicates: ["duplicates", (photos, i) => photos.labels[i] !== TRASH],
  changed: ["changed, not yet moved", (photos, i) => photos.labels[i] !== photos.folders[i]],
  trash: ["trash", (photos, i) => photos.labels[i] === TRASH],
};

export const PHOTO_ORDERS = {
  name: ["by name", null],
  doubt: ["label most probably wrong first", (photos, i) => -(photos.doubts?.[i] ?? -1)],
  lead: ["least certain first", (photos, i) => photos.leads?.[i] ?? Infinity],
};

// The ids to be shown. A filter is a key of FILTERS or `class:` with a name.
export function choosePhotos(photos, filter, order) {
  const matches = filter.startsWith("class:")
    ? (_, i) => photos.labels[i] === filter.slice("class:".length) : (FILTERS[filter] ?? FILTERS.all)[1];
  if (filter === "duplicates") return chooseDuplicates(photos, matches);
  const chosen = [...photos.ids.keys()].filter((i) => matches(photos, i));
  const key = PHOTO_ORDERS[order][1];
  if (key !== null) chosen.sort((a, b) => key(photos, a) - key(photos, b) || a - b);
  return chosen.map((i) => photos.ids[i]);
}

function chooseDuplicates(photos, matches) {
  const present = (photos.groups ?? []).map((group) =>
    group.filter((id) => photos.places.has(id) && matches(photos, photos.places.get(id))));
  return present.filter((group) => group.length > 1).flat();
}
