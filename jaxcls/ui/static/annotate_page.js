// The entry of the page on which photos are labelled: its address keeps what is looked at.

import { AnnotationView } from "./annotate.js";
import { Labelling } from "./labelling.js";
import { PageServer } from "./server.js";

const photos = JSON.parse(document.getElementById("photos").textContent);
new AnnotationView(document.getElementById("page"), new Labelling(photos, new PageServer()), {
  saved: new URLSearchParams(location.hash.slice(1)),
  remember: (view) => history.replaceState(null, "", `#${view}`),
});
