// The confusion matrix: each cell shows its images.

import { button, element, formatCount, nameElement, svgElement } from "./dom.js";
import { EVERYTHING } from "./results.js";

const MAX_TABLE_CLASSES = 40;
const MAX_LISTED = 100;
const REACH = 2; // cells of an image that a pointer may miss

function describeCell(results, [truth, predicted, count]) {
  const [own, other] = [results.classes[truth], results.classes[predicted]];
  const images = formatCount(count, "image");
  return truth === predicted ? `${images} of ${own}, right` : `${images} of ${own}, taken for ${other}`;
}

function isShown({ filter }, [truth, predicted]) {
  return filter.truth === String(truth) && filter.predicted === String(predicted);
}

// Shows the images of a cell; once more, all.
function toggle(selection, cell, node) {
  if (isShown(selection, cell)) {
    selection.change({ truth: "", predicted: "" });
    return;
  }
  const [truth, predicted] = cell.map(String);
  selection.change({ ...EVERYTHING, truth, predicted, order: selection.filter.order });
  node.getRootNode().getElementById("images")?.scrollIntoView();
}

function cellButton(results, selection, cell, strongest) {
  const [truth, predicted, count] = cell;
  const node = button(String(count), () => toggle(selection, cell, node), {
    class: truth === predicted ? "right" : "wrong", "aria-label": describeCell(results, cell), "aria-pressed": "false" });
  node.style.setProperty("--share", `${6 + 34 * Math.sqrt(count / strongest)}%`);
  selection.listen(() => node.setAttribute("aria-pressed", isShown(selection, cell)));
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

// With many classes most of a table would be empty, and its names would find no room.
function matrixImage(results, selection) {
  const { length } = results.classes;
  const strongest = Math.max(...results.confusion.map(([, , count]) => count));
  const square = ([truth, predicted, count]) => svgElement("rect", { x: predicted, y: truth, width: 1, height: 1,
    class: truth === predicted ? "right" : "wrong", "fill-opacity": (0.35 + 0.65 * Math.sqrt(count / strongest)).toFixed(2) });
  const ring = svgElement("rect", { class: "ring", width: 3, height: 3 });
  const told = element("p", { class: "muted" });
  const tell = (cell) => (told.textContent = cell ? `${describeCell(results, cell)}.` : "Point at a cell.");
  const find = ({ clientX, clientY }) => {
    const { left, top, width } = image.getBoundingClientRect();
    const [x, y] = [((clientX - left) / width) * length - 0.5, ((clientY - top) / width) * length - 0.5];
    const distance = ([truth, predicted]) => Math.max(Math.abs(predicted - x), Math.abs(truth - y));
    return results.confusion.filter((cell) => distance(cell) <= REACH).sort((a, b) => distance(a) - distance(b))[0];
  };
  // The list below says the same in text, and takes keys.
  const image = svgElement("svg", { class: "matrix-image", viewBox: `0 0 ${length} ${length}`, "aria-hidden": "true",
    onpointermove: (event) => tell(find(event)), onpointerleave: () => tell(),
    onclick: (event) => {
      const cell = find(event);
      if (cell) toggle(selection, cell, image);
    } }, ...results.confusion.map(square), ring);
  selection.listen(() => {
    const chosen = results.confusion.find((cell) => isShown(selection, cell));
    ring.setAttribute("visibility", chosen ? "visible" : "hidden");
    ring.setAttribute("x", chosen ? chosen[1] - 1 : 0);
    ring.setAttribute("y", chosen ? chosen[0] - 1 : 0);
  });
  tell();
  return element("figure", {}, element("figcaption", { class: "muted", text: "rows: truth; columns: prediction" }), image, told);
}

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
  const views = results.classes.length <= MAX_TABLE_CLASSES ? [matrixTable] : [matrixImage, mistakeList];
  return element("div", {}, element("p", { class: "muted",
    text: "Answered images. A cell shows its images below; chosen again, all." }), ...views.map((draw) => draw(results, selection)));
}
