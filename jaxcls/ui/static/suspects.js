// The images whose label is most probably wrong.

import { button, element, formatCount, formatNumber, hiddenText, nameElement } from "./dom.js";
import { pictureElement } from "./photos.js";

const MAX_SHOWN = 48;
const MIN_PROBABILITY = 0.01;

export function suspectView(results, photos, open) {
  if (!results.wrongLabels) return element("p", { text: `No label could be judged: ${results.noWrongLabels}.` });
  const probability = (i) => results.wrongLabels[i];
  const suspects = [...results.ids.keys()].filter((i) => probability(i) !== null && probability(i) >= MIN_PROBABILITY);
  suspects.sort((a, b) => probability(b) - probability(a));
  const shown = suspects.slice(0, MAX_SHOWN);
  const probable = suspects.filter((i) => probability(i) > 0.5).length;
  const items = shown.map((i, place) => {
    const node = button("", () => open(shown, place), { class: "suspect" });
    node.append(
      element("span", { class: "picture" }, pictureElement(results, photos.thumbnail(i), i)),
      element("span", { class: "caption" }, hiddenText(`${results.ids[i]}, labelled `),
        nameElement(results.classes[results.truth[i]])),
      element("span", { class: "caption" }, "→ ", nameElement(results.classes[results.suggested[i]])),
      element("span", { class: "caption muted", text: `P(wrong) ${formatNumber(probability(i), 2)}` }));
    return element("li", {}, node);
  });
  return element("div", {},
    element("p", { text: `${formatCount(probable, "label is", "labels are")} probably wrong` +
      (shown.length > 0 ? "; the most suspicious:" : ".") }),
    element("p", { class: "muted", text: "This holds only where the classifier was not trained on these images: " +
      "one that was agrees with their labels." }),
    element("ol", { class: "suspects" }, ...items));
}
