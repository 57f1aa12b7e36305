// The entry of a page: what to show stands in the document itself.

import { EmbeddedPhotos, ServedPhotos } from "./photos.js";
import { showResults } from "./report.js";

function embedded(id) {
  const node = document.getElementById(id);
  return node === null ? null : JSON.parse(node.textContent);
}

const results = embedded("results");
const thumbnails = embedded("thumbnails");
const server = { show: (image, path) => (image.src = path) };
showResults(document.getElementById("page"), results,
  thumbnails === null ? new ServedPhotos(server, results.photosVersion) : new EmbeddedPhotos(thumbnails));
