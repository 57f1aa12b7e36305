// The confusion matrix: each cell shows its images.

import { button, element, formatCount, nameElement } from "./dom.js";
import { EVERYTHING } from "./results.js";

const MAX_TABLE_CLASSES = 40;
const MAX_LISTED = 100;

function describeCell(results, [truth, predicted, count]) {
  const [own, other] = [results.classes[truth], results.classes[predicted]];
  const images = formatCount(count, "image");
  return truth === predicted ? `${images} of ${own}, right` : `${images} of ${own}, taken for ${other}`;
}

function cellButton(results, selection, cell, strongest) {
  const [truth, predicted, count] = cell;
  const filter = { truth: String(truth), predicted: String(predicted) };
  const node = button(String(count), null, { class: truth === predicted ? "right" : "wrong",
    "aria-label": describeCell(results, cell), "aria-pressed": "false" });
  node.style.setProperty("--share", `${6 + 34 * Math.sqrt(count / strongest)}%`);
  const isPressed = () => selection.filter.truth === filter.truth && selection.filter.predicted === filter.predicted;
  node.addEventListener("click", () => {
    if (isPressed()) {
      selection.change({ truth: "", predicted: "" });
    } else {
      selection.change({ ...EVERYTHING, ...filter, order: selection.filter.order });
      node.getRootNode().getElementById("images")?.scrollIntoView();
    }
  });
  selection.listen(() => node.setAttribute("aria-pressed", isPressed()));
  return node;
}

function matrixTable(results, selection) {
  const strongest = Math.max(...results.confusion.map(([, , count]) => count));
  const cells = new Map(results.confusion.map((cell) => [`${cell[0]} ${cell[1]}`, cell]));
  const head = element("tr", {}, element("td", { class: "corner", text: "truth ↓ prediction →" }),
    ...results.classes.map((name) => element("th", { scope: "col" }, nameElement(name))));
  const rows = results.classes.map((name, truth) =>
    element("tr", {}, element("th", { scope: "row" }, nameElement(name)),
      ...results.classes.map((_, predicted) => {
        const cell = cells.get(`${truth} ${predicted}`);
        return element("td", {}, cell ? cellButton(results, selection, cell, strongest) : "");
      })));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Confusion matrix" },
    element("table", { class: "matrix" }, element("thead", {}, head), element("tbody", {}, ...rows)));
}

// With many classes most of a table would be empty.
function mistakeList(results, selection) {
  const mistakes = results.confusion.filter(([truth, predicted]) => truth !== predicted);
  const shown = mistakes.sort((a, b) => b[2] - a[2]).slice(0, MAX_LISTED);
  const items = shown.map((cell) =>
    element("li", {}, cellButton(results, selection, cell, shown[0][2]), " ",
      nameElement(results.classes[cell[0]]), " taken for ", nameElement(results.classes[cell[1]])));
  const title = `The ${formatCount(shown.length, "most frequent mistake")} of ${mistakes.length.toLocaleString("en")}`;
  return element("div", {}, element("p", { text: title }), element("ol", { class: "mistakes" }, ...items));
}

export function confusionView(results, selection) {
  const draw = results.classes.length <= MAX_TABLE_CLASSES ? matrixTable : mistakeList;
  return element("div", {}, element("p", { class: "muted",
    text: "Answered images. A number shows its images below; pressed again, all." }), draw(results, selection));
}
