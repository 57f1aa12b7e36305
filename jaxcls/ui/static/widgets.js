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
    view.syncInBackground(); // the data are as old as the widget
    return () => view.close();
  },

  thresholds(root, data, server, model) {
    const known = () => new Map(Object.entries(model.get("chosen"))
      .map(([name, score]) => [data.classes.indexOf(name), score]).filter(([label]) => label >= 0));
    const tell = (chosen) => {
      model.set("chosen", Object.fromEntries([...chosen].map(([label, score]) => [data.classes[label], score])));
      model.save_changes();
    };
    const explorer = new ThresholdExplorer(new Results(data), known(), tell);
    const hear = () => explorer.take(known());
    model.on("change:chosen", hear);
    root.append(element("main", {}, explorer.node));
    return () => model.off("change:chosen", hear);
  },
};

function render({ model, el }) {
  const host = element("div", { "data-lm-suppress-shortcuts": "true" }); // its keys are none of JupyterLab's
  const { jpThemeLight } = document.body.dataset;
  if (jpThemeLight !== undefined) host.style.colorScheme = jpThemeLight === "true" ? "light" : "dark";
  const root = element("div", { id: "page" });
  host.attachShadow({ mode: "open" }).append(element("style", { text: model.get("stylesheet") }), root);
  el.append(host);
  const server = new KernelServer(model, root);
  const close = VIEWS[model.get("view")](root, model.get("data"), server, model);
  return () => {
    close();
    server.close();
  };
}

export default { render };
