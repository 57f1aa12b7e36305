// The threshold explorer: one slider moves the point on both curves; chosen thresholds become a command.

import { button, choice, element, formatCount, formatNumber, labelled, nameElement } from "./dom.js";
import { averagePrecision, CurvePlot, makeCurve, rates, rocArea } from "./curves.js";

// Of a class that has no threshold where others have one: see evaluation/thresholds.py.
const ALWAYS = -3e38;

// The shortest decimals that are this float32 again.
export function shortest(value) {
  for (let digits = 1; digits < 9; digits++) {
    const text = String(Number(value.toPrecision(digits)));
    if (Math.fround(Number(text)) === value) return text;
  }
  return String(Number(value.toPrecision(9)));
}

export function quoteForShell(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function share(part, whole) {
  return `${part.toLocaleString("en")} of ${whole.toLocaleString("en")}` +
    (whole > 0 ? ` (${((100 * part) / whole).toFixed(1)} %)` : "");
}

// What the classifier answers with these thresholds: the best class counts, if its score reaches its threshold.
export function countAnswers(results, thresholds) {
  const counts = { all: 0, answered: 0, right: 0 };
  for (const i of results.counted()) {
    counts.all += 1;
    const best = results.best[i];
    if (results.score(i, best) < (thresholds.get(best) ?? -Infinity)) continue;
    counts.answered += 1;
    if (best === results.truth[i]) counts.right += 1;
  }
  return counts;
}

export class ThresholdExplorer {
  // `chosen` are thresholds: label -> score. `tell` hears of those chosen here.
  constructor(results, chosen = new Map(), tell = () => {}) {
    Object.assign(this, { results, chosen, tell });
    const stored = [...(results.thresholds ?? []).entries()];
    this.stored = new Map(stored.filter(([, threshold]) => threshold > ALWAYS));
    this.roc = new CurvePlot("ROC curve", "false positive rate", "true positive rate",
      ({ falsePositiveRate, recall }) => [falsePositiveRate, recall], false);
    this.pr = new CurvePlot("Precision-recall curve", "recall", "precision",
      ({ recall, precision }) => [recall, precision], true);
    const present = results.classes.map((name, label) => [label, name]).filter(([label]) => results.labelled[label] > 0);
    this.classes = choice(present, { onchange: () => this.pick() });
    this.slider = element("input", { type: "range", min: "0", step: "1", oninput: () => this.slide() });
    this.chooser = button("Choose this threshold", () => this.choose());
    this.value = element("output", { class: "value" });
    this.counts = element("div", { class: "counts" });
    this.note = element("p", { class: "muted" });
    this.choices = element("div", { class: "choices" });
    this.node = element("div", { class: "explorer" },
      element("div", { class: "explorer-controls" }, labelled("Class", this.classes),
        labelled(`Threshold (${results.kind})`, this.slider), this.value, this.chooser),
      element("div", { class: "plots" }, this.figure(this.roc), this.figure(this.pr), this.counts),
      element("p", { class: "muted", text: this.describeScope() }), this.note, this.choices);
    this.pick();
    this.drawChoices();
  }

  figure(plot) {
    return element("figure", {}, element("figcaption", { text: plot.title }), plot.caption, plot.node);
  }

  get label() {
    return Number(this.classes.value);
  }

  get point() {
    return this.curve.points[this.curve.points.length - 1 - Number(this.slider.value)];
  }

  pick() {
    const { results, label } = this;
    this.curve = makeCurve(results, label);
    const { points, isWhole } = this.curve;
    const isEmpty = points.length === 0;
    this.drawCurves();
    this.note.textContent = isWhole ? "" : isEmpty
      ? `No threshold can be chosen: more images share this class's highest score, ${shortest(results.floors[label])}, ` +
        "than are in this file."
      : `The curves end at ${shortest(results.floors[label])}: lower scores of this class are not in this file.`;
    this.slider.disabled = isEmpty;
    this.chooser.disabled = isEmpty;
    if (isEmpty) {
      this.value.textContent = "–";
      this.counts.replaceChildren();
      return;
    }
    this.slider.max = points.length - 1;
    const wanted = this.chosen.get(label) ?? this.stored.get(label) ?? this.bestThreshold();
    const at = points.findLastIndex(({ threshold }) => threshold >= wanted);
    this.slider.value = points.length - 1 - Math.max(0, at);
    this.slide();
  }

  drawCurves() {
    const { points, isWhole, numOwn, numOthers } = this.curve;
    const hasPoints = points.length > 0;
    const scope = `of all ${formatCount(numOwn + numOthers, "labelled image")}`;
    const summarize = (name, measure) => {
      if (!hasPoints) return "none of its scores";
      return isWhole ? `${name} ${formatNumber(measure(this.curve))}, ${scope}` : "its highest scores";
    };
    const area = numOthers === 0 ? "undefined: no images of other classes" : summarize("area", rocArea);
    this.roc.draw(this.curve, area, hasPoints && numOthers > 0);
    this.pr.draw(this.curve, summarize("average precision", averagePrecision), hasPoints);
  }

  describeScope() {
    const answered = this.results.verdicts.filter((verdict) => verdict === "right" || verdict === "wrong").length;
    const all = this.results.counted().length;
    return all === answered ? "" : `The curves and counts are of all ${formatCount(all, "labelled image")}, also the ` +
      `${(all - answered).toLocaleString("en")} on which the classifier abstained; ` +
      `the numbers above are of the ${answered.toLocaleString("en")} answered.`;
  }

  bestThreshold() {
    const scored = this.curve.points.map((point) => [rates(this.curve, point).f1, point.threshold]);
    return scored.reduce((best, one) => (one[0] > best[0] ? one : best))[1];
  }

  slide() {
    const { curve, point, results, label } = this;
    this.roc.mark(point);
    this.pr.mark(point);
    this.value.textContent = shortest(point.threshold);
    this.slider.setAttribute("aria-valuetext", shortest(point.threshold));
    const { recall, precision, falsePositiveRate, f1 } = rates(curve, point);
    const table = element("table", {}, element("caption", { text: "Images that reach the threshold" }),
      element("thead", {}, element("tr", {}, element("td"), element("th", { scope: "col", text: "reach it" }),
        element("th", { scope: "col", text: "do not" }))),
      element("tbody", {},
        this.countRow(results.classes[label], "own", point.own, curve.numOwn),
        this.countRow("other classes", "others", point.others, curve.numOthers)));
    const list = element("dl", {}, ...[["precision", precision], ["recall", recall],
      ["false positive rate", falsePositiveRate], ["F1", f1]].flatMap(([name, value]) =>
      [element("dt", { text: name }), element("dd", { text: formatNumber(value) })]));
    this.counts.replaceChildren(table, list, element("p", { role: "status", text: this.describeAnswers() }));
  }

  countRow(name, key, passed, all) {
    return element("tr", {}, element("th", { scope: "row" }, nameElement(name)),
      element("td", { "data-count": `${key}-passed`, text: passed.toLocaleString("en") }),
      element("td", { "data-count": `${key}-not`, text: (all - passed).toLocaleString("en") }));
  }

  describeAnswers() {
    const { results, label, point } = this;
    const counts = { answered: 0, right: 0, left: 0 };
    for (const i of results.counted()) {
      if (results.best[i] !== label) continue;
      if (results.score(i, label) < point.threshold) counts.left += 1;
      else {
        counts.answered += 1;
        if (results.truth[i] === label) counts.right += 1;
      }
    }
    return `As the classifier's threshold: of the images for which ${results.classes[label]} scores best, ` +
      `${counts.answered.toLocaleString("en")} are answered, ${counts.right.toLocaleString("en")} of them rightly; ` +
      `on ${counts.left.toLocaleString("en")} it abstains.`;
  }

  // Thresholds that were chosen elsewhere.
  take(chosen) {
    this.chosen = chosen;
    this.drawChoices();
  }

  choose() {
    this.chosen.set(this.label, this.point.threshold);
    this.tell(this.chosen);
    this.drawChoices();
  }

  forget(label) {
    this.chosen.delete(label);
    this.tell(this.chosen);
    this.drawChoices();
  }

  command() {
    const { results } = this;
    const sets = [...this.chosen].map(([label, value]) =>
      quoteForShell(`--set=${results.classes[label]}=${shortest(value)}`));
    return `jaxcls thresholds ${results.model} ${sets.join(" ")}`;
  }

  drawChoices() {
    const { results, chosen } = this;
    if (chosen.size === 0) {
      this.choices.replaceChildren(element("p", { class: "muted",
        text: "Chosen thresholds are collected here." }));
      return;
    }
    const counts = countAnswers(results, new Map([...this.stored, ...chosen]));
    const items = [...chosen].map(([label, value]) => element("li", {}, nameElement(results.classes[label]),
      ` ≥ ${shortest(value)} `, button("Remove", () => this.forget(label),
        { "aria-label": `Remove the threshold of ${results.classes[label]}` })));
    this.choices.replaceChildren(
      element("h3", { text: "Chosen thresholds" }), element("ul", {}, ...items),
      element("p", { class: "effect", text: `Answered: ${share(counts.answered, counts.all)}; of these right: ` +
        `${share(counts.right, counts.answered)}. Without thresholds: ${this.withoutThresholds()}.` }),
      ...(results.model == null ? [] : this.commandParts()));
  }

  commandParts() {
    const command = element("pre", { class: "command", tabindex: "0", "aria-label": "Command", text: this.command() });
    const copied = element("span", { role: "status" });
    return [command, button("Copy the command", () => copyText(command, copied)), " ", copied];
  }

  withoutThresholds() {
    const counts = countAnswers(this.results, new Map());
    return `right ${share(counts.right, counts.all)}`;
  }
}

async function copyText(node, status) {
  getSelection().selectAllChildren(node);
  try {
    await navigator.clipboard.writeText(node.textContent);
    status.textContent = "Copied.";
  } catch {
    status.textContent = "The browser did not let it be copied: it is selected, press Ctrl+C.";
  }
}
