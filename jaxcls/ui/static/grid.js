// The images of the selection as a grid. Only rows in sight are in the document, so that it may hold any number.

import { element, formatNumber, hiddenText, nameElement } from "./dom.js";
import { pictureElement } from "./photos.js";

const SYMBOLS = { right: "✓", wrong: "✗", abstained: "?", unlabelled: "·", unreadable: "!" };
const MIN_CELL_WIDTH = 112;
const ROW_HEIGHT = 172;
const SPARE_ROWS = 2;

function cellElement(results, photos, i) {
  const verdict = results.verdicts[i];
  const predicted = results.className(results.predicted[i]) ?? "no answer";
  return element(
    "div",
    { class: `cell ${verdict}`, role: "option" },
    element("div", { class: "picture" }, pictureElement(results, photos.thumbnail(i), i)),
    element("div", { class: "caption" }, hiddenText(`${results.ids[i]}, ${verdict}, predicted `),
      element("span", { class: "symbol", "aria-hidden": "true", text: `${SYMBOLS[verdict]} ` }), nameElement(predicted)),
    element("div", { class: "caption muted" }, hiddenText("truth "),
      nameElement(results.className(results.truth[i]) ?? "no label")),
    element("div", { class: "caption muted", text: formatNumber(results.shownBest(i)) }),
  );
}

export class Grid {
  constructor(selection, photos, open) {
    Object.assign(this, { selection, photos, open, current: 0, cells: new Map() });
    this.space = element("div", { class: "grid-space", role: "presentation" });
    this.node = element(
      "div",
      { class: "grid", role: "listbox", tabindex: "0", "aria-label": "Images",
        onscroll: () => this.draw(), onkeydown: (event) => this.press(event), onclick: (event) => this.click(event) },
      this.space,
    );
    new ResizeObserver(() => this.draw()).observe(this.node);
    selection.listen(() => this.restart());
  }

  get columns() {
    return Math.max(1, Math.floor(this.node.clientWidth / MIN_CELL_WIDTH));
  }

  restart() {
    this.current = 0;
    this.node.scrollTop = 0;
    for (const cell of this.cells.values()) cell.remove();
    this.cells.clear();
    this.draw();
  }

  draw() {
    const { images } = this.selection;
    const { columns } = this;
    const numRows = Math.ceil(images.length / columns);
    this.space.style.height = `${numRows * ROW_HEIGHT}px`;
    const first = Math.max(0, Math.floor(this.node.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
    const rowsInSight = Math.ceil(this.node.clientHeight / ROW_HEIGHT) + 2 * SPARE_ROWS;
    const start = first * columns;
    const end = Math.min(images.length, (first + rowsInSight) * columns);
    for (const [place, cell] of this.cells) {
      if (place < start || place >= end) {
        cell.remove();
        this.cells.delete(place);
      }
    }
    for (let place = start; place < end; place++) this.place(place, columns);
    this.mark();
  }

  place(place, columns) {
    if (!this.cells.has(place)) {
      const cell = cellElement(this.selection.results, this.photos, this.selection.images[place]);
      cell.id = `cell-${place}`;
      cell.setAttribute("aria-posinset", place + 1);
      cell.setAttribute("aria-setsize", this.selection.images.length);
      this.cells.set(place, cell);
      this.space.append(cell);
    }
    const { style } = this.cells.get(place);
    style.width = `${100 / columns}%`;
    style.left = `${(100 / columns) * (place % columns)}%`;
    style.top = `${Math.floor(place / columns) * ROW_HEIGHT}px`;
  }

  mark() {
    for (const [place, cell] of this.cells) cell.setAttribute("aria-selected", place === this.current);
    if (this.cells.has(this.current)) this.node.setAttribute("aria-activedescendant", `cell-${this.current}`);
    else this.node.removeAttribute("aria-activedescendant");
  }

  move(place) {
    this.current = Math.max(0, Math.min(this.selection.images.length - 1, place));
    const top = Math.floor(this.current / this.columns) * ROW_HEIGHT;
    const bottom = top + ROW_HEIGHT - this.node.clientHeight;
    this.node.scrollTop = Math.min(top, Math.max(bottom, this.node.scrollTop));
    this.draw();
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = this.columns * Math.max(1, Math.floor(this.node.clientHeight / ROW_HEIGHT));
    const steps = { ArrowLeft: -1, ArrowRight: 1, k: -1, j: 1, ArrowUp: -this.columns, ArrowDown: this.columns,
      PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity };
    if (event.key in steps) this.move(this.current + steps[event.key]);
    else if (event.key === "Enter" || event.key === " ") this.openCurrent();
    else return;
    event.preventDefault();
  }

  click(event) {
    const cell = event.target.closest(".cell");
    if (cell === null) return;
    this.move(Number(cell.id.slice("cell-".length)));
    this.openCurrent();
  }

  openCurrent() {
    if (this.selection.images.length > 0) this.open(this.selection.images, this.current, (place) => this.move(place));
  }
}
