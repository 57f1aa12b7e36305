// A page of results, in a report or from `jaxcls review`: all views of one selection.

import { button, element, isTyping } from "./dom.js";
import { filterBar } from "./filters.js";
import { Grid } from "./grid.js";
import { confusionView } from "./matrix.js";
import { numbersView } from "./numbers.js";
import { EmbeddedPhotos, ServedPhotos } from "./photos.js";
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

export function showResults(root, payload, thumbnails) {
  const results = new Results(payload);
  const photos = thumbnails === null ? new ServedPhotos(results.photosVersion) : new EmbeddedPhotos(thumbnails);
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
        ...sections.map(([id, title]) => element("a", { href: `#${id}`, text: title })),
        button("Keys (?)", () => help.showModal()))),
    element("main", {}, ...sections.map((parts) => section(...parts))),
    element("footer", { class: "muted", text: results.note }), viewer.node, help);
  document.addEventListener("keydown", (event) => {
    if (isTyping(event.target) || viewer.node.open || help.open || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") filters.search.focus();
    else if (event.key === "?") help.showModal();
    else if (["j", "k"].includes(event.key) && !grid.node.contains(event.target)) grid.node.focus();
    else return;
    event.preventDefault();
  });
}
