// The results of N images and K classes, as `results.py` wrote them, and what is looked up in them.

export const VERDICTS = ["right", "wrong", "abstained", "unlabelled", "unreadable"];

export const ORDERS = {
  read: "as they were read",
  loss: "highest loss first",
  "low-loss": "lowest loss first",
  "low-score": "lowest score first",
  "high-score": "highest score first",
  label: "label most probably wrong first",
};

function decodeBytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
}

function decodeScores({ dense, places, values }, length) {
  if (dense) return new Float32Array(decodeBytes(dense));
  const scores = new Float32Array(length).fill(NaN);
  const known = new Float32Array(decodeBytes(values));
  new Uint32Array(decodeBytes(places)).forEach((place, i) => (scores[place] = known[i]));
  return scores;
}

export class Results {
  constructor(payload) {
    Object.assign(this, payload);
    this.length = this.ids.length;
    this.scores = decodeScores(payload.scores, this.length * this.classes.length);
    const abstained = new Set(this.abstained);
    this.predicted = this.best.map((best, i) => (abstained.has(i) ? -1 : best));
    this.verdicts = this.ids.map((_, i) => this.judge(i, abstained));
  }

  judge(i, abstained) {
    if (this.errors[i] !== undefined) return "unreadable";
    if (this.truth[i] < 0) return "unlabelled";
    if (abstained.has(i)) return "abstained";
    return this.best[i] === this.truth[i] ? "right" : "wrong";
  }

  // As the classifier gives it, and as thresholds meet it. NaN where it is not known.
  score(i, label) {
    return this.scores[i * this.classes.length + label];
  }

  // As people read it: a probability, but for margins.
  shown(i, label) {
    const score = this.score(i, label);
    return this.normalizers ? Math.exp(score - this.normalizers[i]) : score;
  }

  shownBest(i) {
    return this.best[i] < 0 ? NaN : this.shown(i, this.best[i]);
  }

  className(label) {
    return label < 0 ? null : this.classes[label];
  }

  // Images that count for a threshold: read and labelled, whether or not they were answered.
  counted() {
    return [...this.ids.keys()].filter((i) => this.best[i] >= 0 && this.truth[i] >= 0);
  }
}

function matches(results, filter, i) {
  const score = results.shownBest(i);
  return (
    (filter.verdict === "" || results.verdicts[i] === filter.verdict) &&
    (filter.truth === "" || results.truth[i] === Number(filter.truth)) &&
    (filter.predicted === "" || results.predicted[i] === Number(filter.predicted)) &&
    (filter.low === "" || score >= Number(filter.low)) &&
    (filter.high === "" || score <= Number(filter.high)) &&
    (filter.text === "" || results.ids[i].toLowerCase().includes(filter.text.toLowerCase()))
  );
}

function sortKey(results, order) {
  const last = (value) => (value === null || Number.isNaN(value) ? Infinity : value);
  return {
    read: null,
    loss: (i) => last(results.losses[i] === null ? null : -results.losses[i]),
    "low-loss": (i) => last(results.losses[i]),
    "low-score": (i) => last(results.shownBest(i)),
    "high-score": (i) => last(-results.shownBest(i)),
    label: (i) => last(results.wrongLabels?.[i] == null ? null : -results.wrongLabels[i]),
  }[order];
}

export function select(results, filter) {
  const chosen = [...results.ids.keys()].filter((i) => matches(results, filter, i));
  const key = sortKey(results, filter.order);
  if (key === null) return chosen;
  const keys = new Map(chosen.map((i) => [i, key(i)]));
  return chosen.sort((a, b) => (keys.get(a) === keys.get(b) ? 0 : keys.get(a) - keys.get(b)));
}

export const EVERYTHING = { text: "", verdict: "", truth: "", predicted: "", low: "", high: "", order: "read" };

// Which images are looked at: a filter that views change, and hear of when another changed it.
export class Selection {
  constructor(results) {
    this.results = results;
    this.listeners = [];
    this.filter = EVERYTHING;
    this.images = select(results, this.filter);
  }

  change(changes) {
    this.filter = { ...this.filter, ...changes };
    this.images = select(this.results, this.filter);
    for (const listener of this.listeners) listener(this);
  }

  listen(listener) {
    this.listeners.push(listener);
    listener(this);
  }
}
