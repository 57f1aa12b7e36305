// One image at a time: picture, truth and prediction, and the scores of all classes.

import { button, element, formatNumber, nameElement } from "./dom.js";
import { pictureElement } from "./photos.js";

const MAX_BARS = 50;

function rankedClasses(results, i) {
  const ranked = [...results.classes.keys()].filter((label) => !Number.isNaN(results.score(i, label)));
  ranked.sort((a, b) => results.score(i, b) - results.score(i, a));
  return ranked.slice(0, MAX_BARS).concat(ranked.slice(MAX_BARS).filter((label) => label === results.truth[i]));
}

function barList(results, i) {
  const ranked = rankedClasses(results, i);
  const values = ranked.map((label) => results.shown(i, label));
  const low = Math.min(0, ...values);
  const span = Math.max(results.kind === "margin" ? 0 : 1, ...values) - low;
  const items = ranked.map((label, rank) => {
    const value = values[rank];
    const bar = element("span", { class: "bar" });
    bar.style.left = `${(100 * (Math.min(0, value) - low)) / span}%`;
    bar.style.width = `${(100 * Math.abs(value)) / span}%`;
    const marks = [label === results.truth[i] && "truth", label === results.predicted[i] && "prediction"];
    return element("li", { class: label === results.truth[i] ? "truth" : null },
      nameElement(results.classes[label]), element("span", { class: "track", "aria-hidden": "true" }, bar),
      element("span", { class: "value", text: formatNumber(value) }),
      element("span", { class: "marks", text: marks.filter(Boolean).join(", ") }));
  });
  const hidden = results.classes.length - ranked.length;
  if (hidden > 0) items.push(element("li", { class: "muted", text: `${hidden} classes of lower scores` }));
  return element("ol", { class: "bars", "aria-label": results.scoreName }, ...items);
}

function facts(results, i) {
  const rows = [
    ["Truth", results.className(results.truth[i]) ?? "not labelled"],
    ["Prediction", results.className(results.predicted[i]) ?? results.verdicts[i]],
  ];
  if (results.errors[i] !== undefined) rows.push(["Error", results.errors[i]]);
  if (results.losses[i] !== null) rows.push([results.lossName, formatNumber(results.losses[i])]);
  if (results.wrongLabels?.[i] != null) {
    rows.push(["P(label is wrong)", formatNumber(results.wrongLabels[i])]);
    if (results.wrongLabels[i] > 0.5) rows.push(["Suggested", results.classes[results.suggested[i]]]);
  }
  return element("dl", {}, ...rows.flatMap(([term, value]) =>
    [element("dt", { text: term }), element("dd", {}, nameElement(value))]));
}

export class Viewer {
  constructor(results, photos) {
    Object.assign(this, { results, photos, images: [], place: 0, onMove: () => {} });
    this.title = element("h2", { id: "viewer-title" });
    this.slider = element("input", { type: "range", min: "0", "aria-label": "Position",
      oninput: () => this.show(Number(this.slider.value)) });
    this.count = element("span", { class: "muted" });
    this.body = element("div", { class: "viewer-body" });
    this.back = button("←", () => this.show(this.place - 1), { "aria-label": "Previous image" });
    this.next = button("→", () => this.show(this.place + 1), { "aria-label": "Next image" });
    this.node = element("dialog", { class: "viewer", "aria-labelledby": "viewer-title",
      onkeydown: (event) => this.press(event) },
      element("div", { class: "viewer-head" }, this.title,
        button("Close", () => this.node.close(), { "aria-label": "Close (Esc)" })),
      element("div", { class: "viewer-steps" }, this.back, this.slider, this.next, this.count),
      this.body);
  }

  open(images, place, onMove = () => {}) {
    Object.assign(this, { images, onMove });
    this.slider.max = images.length - 1;
    this.node.showModal();
    this.show(place);
  }

  show(place) {
    this.place = Math.max(0, Math.min(this.images.length - 1, place));
    const { results } = this;
    const i = this.images[this.place];
    const verdict = results.verdicts[i];
    this.title.replaceChildren(nameElement(results.ids[i]));
    this.slider.value = this.place;
    this.slider.setAttribute("aria-valuetext", `${this.place + 1} of ${this.images.length}`);
    this.count.textContent = `${this.place + 1} / ${this.images.length}`;
    this.back.disabled = this.place === 0;
    this.next.disabled = this.place === this.images.length - 1;
    const scores = results.best[i] < 0 ? [] : [element("h3", { text: results.scoreName }), barList(results, i)];
    this.body.replaceChildren(
      element("div", { class: "picture" }, pictureElement(results, this.photos.whole(i), i, { fetchpriority: "high" })),
      element("div", { class: "viewer-facts" }, element("p", { class: `verdict ${verdict}`, text: verdict }),
        facts(results, i), ...scores));
    this.onMove(this.place);
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onSlider = event.target === this.slider;
    const steps = { ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || (onSlider && event.key.length > 1)) return;
    this.show(this.place + steps[event.key]);
    event.preventDefault();
  }
}
