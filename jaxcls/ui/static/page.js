// The entry of a page: what to show stands in the document itself.

import { showResults } from "./report.js";

function embedded(id) {
  const node = document.getElementById(id);
  return node === null ? null : JSON.parse(node.textContent);
}

showResults(document.getElementById("page"), embedded("results"), embedded("thumbnails"));
