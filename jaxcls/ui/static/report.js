// Results, in a report, from `jaxcls review` or in a notebook: all views of one selection.

import { button, element, isTyping } from "./dom.js";
import { filterBar } from "./filters.js";
import { Grid } from "./grid.js";
import { confusionView } from "./matrix.js";
import { numbersView } from "./numbers.js";
import { Results, Selection } from "./results.js";
import { suspectView } from "./suspects.js";
import { ThresholdExplorer } from "./thresholds.js";
import { Viewer } from "./viewer.js";

const KEYS = [
  ["/", "search the file names"],
  ["Arrows, j, k", "go through the images"],
  ["Enter", "open the image"],
  ["← →, j, k, Home, End", "in the viewer: another image"],
  ["Esc", "close"],
  ["?", "this list"],
];

function helpDialog() {
  const rows = KEYS.flatMap(([key, meaning]) => [element("dt", {}, element("kbd", { text: key })),
    element("dd", { text: meaning })]);
  const node = element("dialog", { class: "help", "aria-labelledby": "help-title" },
    element("h2", { id: "help-title", text: "Keys" }), element("dl", {}, ...rows),
    button("Close", () => node.close()));
  return node;
}

function section(id, title, ...content) {
  return element("section", { id, "aria-labelledby": `${id}-title` },
    element("h2", { id: `${id}-title`, text: title }), ...content);
}

// Links work by themselves, but in a shadow tree, where only this finds their section.
function goTo(event) {
  const root = event.target.getRootNode();
  if (root === document) return;
  event.preventDefault();
  root.querySelector(event.target.getAttribute("href")).scrollIntoView();
}

// Keys are heard everywhere, or else only within `surface`.
export function showResults(root, payload, photos, surface = document) {
  const results = new Results(payload);
  const selection = new Selection(results);
  const viewer = new Viewer(results, photos);
  const help = helpDialog();
  const open = (images, place, onMove) => viewer.open(images, place, onMove);
  const grid = new Grid(selection, photos, open);
  const filters = filterBar(selection);
  const sections = [
    ["numbers", "Numbers", numbersView(results)],
    ["confusion", "Confusion", confusionView(results, selection)],
    ["images", "Images", filters.node, grid.node],
    ["thresholds", "Thresholds", new ThresholdExplorer(results).node],
    ["labels", "Labels", suspectView(results, photos, open)],
  ];
  root.replaceChildren(
    element("header", {}, element("h1", { text: results.title }),
      element("nav", { "aria-label": "Sections" },
        ...sections.map(([id, title]) => element("a", { href: `#${id}`, text: title, onclick: goTo })),
        button("Keys (?)", () => help.showModal()))),
    element("main", {}, ...sections.map((parts) => section(...parts))),
    element("footer", { class: "muted", text: results.note }), viewer.node, help);
  surface.addEventListener("keydown", (event) => {
    if (isTyping(event.target) || viewer.node.open || help.open || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") filters.search.focus();
    else if (event.key === "?") help.showModal();
    else if (["j", "k"].includes(event.key) && !grid.node.contains(event.target)) grid.node.focus();
    else return;
    event.preventDefault();
  });
}
