// The controls that narrow the selection, and the number of images that are left.

import { button, choice, element, formatCount, labelled } from "./dom.js";
import { EVERYTHING, ORDERS, VERDICTS } from "./results.js";

function controls(results) {
  const classes = [["", "any"], ...results.classes.map((name, label) => [label, name])];
  const orders = Object.entries(ORDERS).filter(([order]) => order !== "label" || results.wrongLabels);
  return {
    text: element("input", { type: "search", placeholder: "file name" }),
    verdict: choice([["", "any"], ...VERDICTS.map((verdict) => [verdict, verdict])]),
    truth: choice(classes),
    predicted: choice([...classes, [-1, "(no answer)"]]),
    low: element("input", { type: "number", step: "any" }),
    high: element("input", { type: "number", step: "any" }),
    order: choice(orders),
  };
}

export function filterBar(selection) {
  const { results } = selection;
  const fields = controls(results);
  const names = { text: "Search (/)", verdict: "Answer", truth: "Truth", predicted: "Prediction",
    low: `${results.scoreName}, from`, high: `${results.scoreName}, to`, order: "Order" };
  for (const [key, control] of Object.entries(fields)) {
    const event = control.tagName === "SELECT" ? "change" : "input";
    control.addEventListener(event, () => selection.change({ [key]: control.value }));
  }
  const status = element("p", { class: "status", role: "status" });
  selection.listen(({ filter, images }) => {
    for (const [key, control] of Object.entries(fields)) {
      if (control.value !== String(filter[key])) control.value = filter[key];
    }
    status.textContent = `${images.length.toLocaleString("en")} of ${formatCount(results.length, "image")}`;
  });
  const node = element(
    "form",
    { class: "filters", "aria-label": "Filter", onsubmit: (event) => event.preventDefault() },
    ...Object.entries(fields).map(([key, control]) => labelled(names[key], control, key === "order")),
    button("Show all", () => selection.change(EVERYTHING)),
    status,
  );
  return { node, search: fields.text };
}
