// The entry of notebook widgets: each view in a shadow tree, so that its style and the notebook's do not meet.

import { AnnotationView } from "./annotate.js";
import { element } from "./dom.js";
import { Labelling } from "./labelling.js";
import { ServedPhotos } from "./photos.js";
import { showResults } from "./report.js";
import { Results } from "./results.js";
import { KernelServer } from "./server.js";
import { ThresholdExplorer } from "./thresholds.js";

const VIEWS = {
  review(root, data, server) {
    showResults(root, data, new ServedPhotos(server, data.photosVersion), root);
    return () => {};
  },

  annotate(root, data, server) {
    const view = new AnnotationView(root, new Labelling(data, server), { surface: root });
    return () => view.close();
  },

  thresholds(root, data, server, model) {
    const tell = (chosen) => {
      model.set("chosen", Object.fromEntries([...chosen].map(([label, score]) => [data.classes[label], score])));
      model.save_changes();
    };
    root.append(element("main", {}, new ThresholdExplorer(new Results(data), tell).node));
    return () => {};
  },
};

function render({ model, el }) {
  const host = element("div", { "data-lm-suppress-shortcuts": "true" }); // its keys are none of JupyterLab's
  const { jpThemeLight } = document.body.dataset;
  if (jpThemeLight !== undefined) host.style.colorScheme = jpThemeLight === "true" ? "light" : "dark";
  const root = element("div", { id: "page" });
  host.attachShadow({ mode: "open" }).append(element("style", { text: model.get("stylesheet") }), root);
  el.append(host);
  const server = new KernelServer(model);
  const close = VIEWS[model.get("view")](root, model.get("data"), server, model);
  return () => {
    close();
    server.close();
  };
}

export default { render };
