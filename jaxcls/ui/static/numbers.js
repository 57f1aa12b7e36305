// The numbers of the whole test set, with their intervals, and those of each class.

import { element, formatCount, formatNumber, nameElement } from "./dom.js";

function table(caption, head, rows) {
  return element("table", {}, element("caption", { text: caption }),
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col", text })))),
    element("tbody", {}, ...rows.map(([name, ...cells]) =>
      element("tr", {}, element("th", { scope: "row" }, name),
        ...cells.map((text) => element("td", { text }))))));
}

export function numbersView(results) {
  const numbers = results.numbers.map(({ name, value, low, high }) => [
    name, formatNumber(value, 4), low === null ? "–" : `${formatNumber(low, 4)} to ${formatNumber(high, 4)}`,
  ]);
  const { precision, recall, f1 } = results.perClass;
  const classes = results.classes.map((name, k) => [
    nameElement(name), formatNumber(precision[k]), formatNumber(recall[k]), formatNumber(f1[k]), String(results.support[k]),
  ]);
  const { answered, ...others } = results.counts;
  const rest = Object.entries(others).map(([name, count]) => `${count.toLocaleString("en")} ${name}`).join(", ");
  return element("div", { class: "numbers" },
    element("p", { text: `${formatCount(results.length, "image")}: ${answered.toLocaleString("en")} answered, ${rest}.` }),
    table("The answered images", ["metric", "value", "95 % interval"], numbers),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Classes" },
      table("Each class", ["class", "precision", "recall", "F1", "answered images"], classes)));
}
