// Labelling photos: pages of thumbnails, and labels by key or click.

import { button, choice, element, formatCount, formatNumber, isTyping, labelled, nameElement } from "./dom.js";
import { choosePhotos, FILTERS, NO_LABEL, PHOTO_ORDERS, titleOf, TRASH } from "./labelling.js";
import { imageElement } from "./photos.js";

const PAGE_SIZES = [24, 48, 96, 192];
const CLASS_KEYS = "1234567890";
const SYNC_MILLISECONDS = 5000;
const HELP = [
  ["1 to 9, 0", "label with the first ten classes"],
  ["l", "label by name, also with a new class"],
  ["u", "take the label away"],
  ["x, Delete", "into the trash"],
  ["z, y", "undo, redo"],
  ["Arrows, j, k", "another photo"],
  ["Space", "select the photo; Shift and click, those in between; a, the whole page"],
  ["Esc", "select none; close"],
  ["Enter", "zoom"],
  ["[ ]", "another page"],
  ["/", "filter"],
  ["?", "this list"],
];

function pictureOf(photos, id, size, onFailure = () => {}) {
  const isWhole = size === "whole";
  const node = imageElement((image) => photos.server.show(image, `photo?${new URLSearchParams({ id, size })}`),
    { loading: isWhole ? "eager" : "lazy", fetchpriority: isWhole ? "high" : "auto" });
  node.addEventListener("error", () => {
    node.replaceWith(element("span", { class: "no-picture", text: "unreadable" }));
    onFailure();
  });
  return node;
}

function showLabel(control, label) {
  if (control.value === label) return;
  if (![...control.options].some((option) => option.value === label)) {
    control.append(element("option", { value: label, text: titleOf(label) }));
  }
  control.value = label;
}

export class AnnotationView {
  // Keys and clicks are heard everywhere, or else only within `surface`; `remember` is told what is looked at.
  constructor(root, photos, { surface = document, saved = new URLSearchParams(), remember = () => {} } = {}) {
    const pageSize = PAGE_SIZES.find((size) => size === Number(saved.get("size"))) ?? 48;
    Object.assign(this, { root, photos, remember, shown: [], page: 0, pageSize, current: 0, anchor: 0,
      selected: new Set(), cells: new Map() });
    this.build(root, saved);
    photos.listen((news) => this.hear(news));
    this.choose(Number(saved.get("page") ?? 1) - 1);
    surface.addEventListener("keydown", (event) => this.press(event));
    for (const kind of ["pointerdown", "keydown"]) {
      surface.addEventListener(kind, () => (this.isPointing = kind === "pointerdown"), { capture: true });
    }
    this.timer = setInterval(() => this.syncInBackground(), SYNC_MILLISECONDS);
  }

  close() {
    clearInterval(this.timer);
  }

  build(root, saved) {
    const { photos } = this;
    this.filter = element("select", { onchange: () => this.chooseAnew() });
    this.fillFilter();
    this.filter.value = saved.get("filter") ?? "all";
    if (this.filter.value === "") this.filter.value = "all";
    this.order = choice(Object.entries(PHOTO_ORDERS).map(([key, [text]]) => [key, text]), { onchange: () => this.chooseAnew() });
    this.order.querySelector("[value=doubt]").disabled = photos.doubts === null;
    this.order.querySelector("[value=lead]").disabled = photos.leads === null;
    const order = this.order.querySelector(`[value=${CSS.escape(saved.get("order") ?? "name")}]:enabled`);
    this.order.value = order === null ? "name" : order.value;
    this.size = choice(PAGE_SIZES.map((size) => [size, size]), { onchange: () => this.resize() });
    this.size.value = this.pageSize;
    this.slider = element("input", { type: "range", min: "1", step: "1", oninput: () => this.turn(Number(this.slider.value) - 1) });
    this.back = button("←", () => this.turn(this.page - 1), { "aria-label": "Previous page" });
    this.next = button("→", () => this.turn(this.page + 1), { "aria-label": "Next page" });
    this.count = element("span", { class: "muted" });
    this.undo = button("Undo", () => photos.undo());
    this.redo = button("Redo", () => photos.redo());
    this.status = element("p", { class: "status", role: "status" });
    this.pending = element("p", { class: "muted" });
    this.list = element("ul", { class: "photo-pages", "aria-label": "Photos" });
    this.palette = element("div", { class: "palette", role: "group", "aria-label": "Label the selected photos" });
    this.byName = element("input", { list: "class-names", autocomplete: "off", maxlength: "200",
      "aria-label": "Label by name, also with a new class", placeholder: "name, or a new class (l)",
      onkeydown: (event) => this.pressInName(event), oninput: () => (this.offered = null) });
    this.names = element("datalist", { id: "class-names" });
    this.zoom = this.makeZoom();
    this.help = element("dialog", { class: "help", "aria-labelledby": "help-title" },
      element("h2", { id: "help-title", text: "Keys" }),
      element("dl", {}, ...HELP.flatMap(([key, meaning]) =>
        [element("dt", {}, element("kbd", { text: key })), element("dd", { text: meaning })])),
      button("Close", () => this.help.close()));
    root.replaceChildren(
      element("header", { class: "annotate-head" }, element("h1", {}, nameElement(photos.title)),
        this.undo, this.redo, button("Refresh", () => this.refresh()), button("Keys (?)", () => this.help.showModal())),
      element("main", {},
        element("div", { class: "filters" }, labelled("Show", this.filter), labelled("Order", this.order),
          labelled("Per page", this.size)),
        element("div", { class: "viewer-steps" }, this.back, labelled("Page", this.slider), this.next, this.count),
        this.pending, this.list),
      element("footer", { class: "label-bar" }, this.status, this.palette,
        element("div", { class: "by-name" }, this.byName, this.names, button("Label", () => this.labelByName()))),
      this.zoom.node, this.help);
  }

  fillFilter() {
    const { photos } = this;
    const { value } = this.filter;
    const missing = { wrong: photos.doubts === null && "needs label errors",
      disagree: photos.leads === null && "needs a classifier" };
    const fixed = Object.entries(FILTERS).map(([key, [text]]) => element("option", { value: key,
      text: missing[key] ? `${text} (${missing[key]})` : text, disabled: Boolean(missing[key]) }));
    const classes = photos.classes.map((name) => element("option", { value: `class:${name}`, text: `class ${name}` }));
    this.filter.replaceChildren(...fixed, ...classes);
    if (value !== "") this.filter.value = value;
  }

  // What is shown stays as it is while labels change: a photo that no longer matches does not leave at once.
  async choose(page = 0) {
    const filter = this.filter.value;
    if (filter === "duplicates" && this.photos.groups === null) {
      this.say("Looking for duplicates …");
      try {
        await this.photos.findDuplicates();
        this.say("");
      } catch (error) {
        this.say(error.message);
      }
      if (this.filter.value !== filter) return;
    }
    this.shown = choosePhotos(this.photos, filter, this.order.value);
    this.selected.clear();
    this.turn(page);
  }

  // After a click the keys belong to the photos; who uses keys to choose may not have chosen yet.
  async chooseAnew() {
    await this.choose();
    if (this.isPointing) this.focusCurrent();
  }

  resize() {
    const first = this.page * this.pageSize;
    this.pageSize = Number(this.size.value);
    this.turn(Math.floor(first / this.pageSize));
  }

  get numPages() {
    return Math.max(1, Math.ceil(this.shown.length / this.pageSize));
  }

  get onPage() {
    return this.shown.slice(this.page * this.pageSize, (this.page + 1) * this.pageSize);
  }

  turn(page, current = 0) {
    this.page = Math.max(0, Math.min(this.numPages - 1, page || 0));
    Object.assign(this, { current, anchor: current });
    if (this.selected.size > 0) this.clearSelection(); // keys never label what is out of sight
    this.slider.max = this.numPages;
    this.slider.value = this.page + 1;
    this.slider.disabled = this.numPages === 1;
    this.slider.setAttribute("aria-valuetext", `${this.page + 1} of ${this.numPages}`);
    this.back.disabled = this.page === 0;
    this.next.disabled = this.page === this.numPages - 1;
    this.count.textContent = `${this.page + 1} / ${this.numPages}, ${formatCount(this.shown.length, "photo")}`;
    this.cells = new Map(this.onPage.map((id, place) => [id, this.makeCell(id, place)]));
    const none = element("li", { class: "muted", text: "No photo is shown with this filter." });
    this.list.scrollTop = 0;
    this.list.replaceChildren(...(this.cells.size > 0 ? [...this.cells.values()].map(({ node }) => node) : [none]));
    if (this.root.getBoundingClientRect().top < 0) this.root.scrollIntoView();
    this.draw();
    const { value: filter } = this.filter;
    this.remember(new URLSearchParams({ filter, order: this.order.value, size: this.pageSize, page: this.page + 1 }));
  }

  makeCell(id, place) {
    const picture = button("", (event) => this.click(place, event), { class: "picture", "aria-label": `Select ${id}`,
      ondblclick: () => this.openZoom(place) });
    picture.append(pictureOf(this.photos, id, "thumbnail", () => picture.setAttribute("aria-label", `Select ${id}, unreadable`)));
    const label = this.makeLabelChoice(() => id, { "aria-label": `Label of ${id}` });
    const zoom = button("⤢", () => this.openZoom(place), { class: "zoom", "aria-label": `Zoom ${id}` });
    const hint = element("div", { class: "caption muted" });
    const node = element("li", { class: "photo", onfocusin: () => this.makeCurrent(place) }, picture, zoom,
      element("div", { class: "caption" }, nameElement(id.slice(id.lastIndexOf("/") + 1), { title: id })), label, hint);
    return { node, picture, label, zoom, hint };
  }

  // It lists the other classes only once somebody looks: there may be thousands, for each photo.
  makeLabelChoice(photo, attributes = {}) {
    const fillIn = () => {
      const label = control.value;
      const all = [...this.photos.classes, NO_LABEL, TRASH];
      if (control.options.length === all.length) return;
      control.replaceChildren(...all.map((name) => element("option", { value: name, text: titleOf(name) })));
      control.value = label;
    };
    const control = element("select", { ...attributes, onpointerdown: fillIn, onfocus: fillIn,
      onchange: () => {
        this.photos.edit([photo()], control.value);
        if (this.isPointing && !this.zoom.node.open) this.focusCurrent();
      } });
    return control;
  }

  draw() {
    const { photos } = this;
    this.onPage.forEach((id, place) => this.drawCell(id, place));
    this.undo.disabled = photos.undoable === null;
    this.redo.disabled = photos.redoable === null;
    const changed = photos.numChanged();
    this.pending.textContent = changed === 0 ? "Every photo lies in the folder of its label." :
      `${formatCount(changed, "photo")} not yet moved: jaxcls annotate DATA --apply does it.`;
    if (this.numClasses !== photos.classes.length) {
      this.numClasses = photos.classes.length;
      this.drawPalette();
      this.fillFilter();
    }
    this.drawZoom();
  }

  drawCell(id, place) {
    const { photos } = this;
    const { node, picture, label, zoom, hint } = this.cells.get(id);
    const i = photos.places.get(id);
    const own = photos.labels[i] ?? NO_LABEL;
    showLabel(label, own);
    hint.replaceChildren(...this.hints(i));
    node.classList.toggle("changed", own !== photos.folders[i]);
    node.classList.toggle("trashed", own === TRASH);
    node.classList.toggle("current", place === this.current);
    picture.setAttribute("aria-pressed", this.selected.has(id));
    for (const control of [picture, label, zoom]) control.tabIndex = place === this.current ? 0 : -1;
  }

  hints(i) {
    const { photos } = this;
    const parts = [];
    if (photos.doubts?.[i] > 0.5) parts.push(nameElement(photos.suggested[i]), `? P(wrong) ${formatNumber(photos.doubts[i], 2)}`);
    else if (photos.predicted[i] !== null) parts.push("→ ", nameElement(photos.predicted[i]), ` +${formatNumber(photos.leads[i], 2)}`);
    return parts;
  }

  drawPalette() {
    const { photos } = this;
    const make = (label, key) => button("", () => this.label(label), { "aria-keyshortcuts": key || null });
    const classes = photos.classes.slice(0, CLASS_KEYS.length).map((name, place) => [name, CLASS_KEYS[place]]);
    this.palette.replaceChildren(...[...classes, [NO_LABEL, "u"], [TRASH, "x"]].map(([label, key]) => {
      const node = make(label, key);
      node.append(element("kbd", { text: key }), " ", nameElement(titleOf(label)));
      return node;
    }));
    this.names.replaceChildren(...photos.classes.map((name) => element("option", { value: name })));
  }

  say(text) {
    this.status.textContent = text;
    this.zoom.status.textContent = text;
  }

  hear({ done, problem, areOthers }) {
    if (done !== undefined || problem !== undefined) this.say(problem ?? done);
    if (areOthers) this.choose(this.page);
    else this.draw();
  }

  async refresh() {
    try {
      await this.photos.sync(-1);
      await this.choose(this.page);
    } catch (error) {
      this.say(error.message);
    }
  }

  // A server that takes its time is not asked again meanwhile.
  async syncInBackground() {
    if (document.hidden || this.isSyncing) return;
    this.isSyncing = true;
    try {
      await this.photos.sync();
    } catch (error) {
      this.say(error.message);
    }
    this.isSyncing = false;
  }

  // Labels what is selected, or else the current photo, and goes on to the next.
  label(label) {
    const { current, onPage } = this;
    const isOne = this.selected.size === 0 || this.zoom.node.open;
    const chosen = isOne ? onPage.slice(current, current + 1) : [...this.selected];
    if (chosen.length === 0) return;
    if (!isOne) this.selected.clear();
    this.photos.edit(chosen, label);
    if (isOne) this.move(current + 1);
  }

  labelByName() {
    const name = this.byName.value.trim();
    if (name === "") return;
    if (!this.photos.classes.includes(name) && this.offered !== name) {
      this.offered = name;
      this.say(`${name} is a new class: press Enter once more to make it.`);
      return;
    }
    this.offered = null;
    this.byName.value = "";
    this.label(name);
    this.focusCurrent();
  }

  pressInName(event) {
    if (event.key === "Enter") this.labelByName();
    else if (event.key === "Escape") this.focusCurrent();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  click(place, event) {
    const [low, high] = event.shiftKey ? [Math.min(place, this.anchor), Math.max(place, this.anchor)] : [place, place];
    const ids = this.onPage.slice(low, high + 1);
    const adds = event.shiftKey || !this.selected.has(ids[0]);
    for (const id of ids) {
      if (adds) this.selected.add(id);
      else this.selected.delete(id);
    }
    this.current = place;
    if (!event.shiftKey) this.anchor = place;
    this.tellSelection();
    this.draw();
  }

  tellSelection() {
    this.say(this.selected.size === 0 ? "" : `${formatCount(this.selected.size, "photo")} selected`);
  }

  // Steps beyond the page turn it.
  move(place) {
    const { length } = this.onPage;
    if (place >= length && this.page < this.numPages - 1) this.turn(this.page + 1);
    else if (place < 0 && this.page > 0) this.turn(this.page - 1, this.pageSize - 1);
    else this.current = Math.max(0, Math.min(length - 1, place));
    this.draw();
    if (!this.zoom.node.open) this.focusCurrent();
  }

  makeCurrent(place) {
    if (place === this.current) return;
    this.current = place;
    this.draw();
  }

  focusCurrent() {
    this.cells.get(this.onPage[this.current])?.picture.focus();
  }

  get columns() {
    const tops = [...this.cells.values()].map(({ node }) => node.offsetTop);
    return Math.max(1, tops.filter((top) => top === tops[0]).length);
  }

  press(event) {
    if (event.defaultPrevented || event.altKey || this.help.open) return;
    if (isTyping(event.target)) {
      if (event.key === "Escape" && !this.zoom.node.open) this.focusCurrent();
      return;
    }
    const { photos, zoom, columns } = this;
    const isUndo = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z";
    if ((event.ctrlKey || event.metaKey) && !isUndo) return;
    const onSlider = event.target.type === "range";
    const steps = zoom.node.open ? { ArrowLeft: -1, ArrowRight: 1, k: -1, j: 1 } :
      { ArrowLeft: -1, ArrowRight: 1, k: -1, j: 1, ArrowUp: -columns, ArrowDown: columns };
    const place = CLASS_KEYS.indexOf(event.key);
    if (place >= 0 && place < photos.classes.length) this.label(photos.classes[place]);
    else if (event.key === "u") this.label(NO_LABEL);
    else if (event.key === "x" || event.key === "Delete") this.label(TRASH);
    else if (isUndo ? !event.shiftKey : event.key === "z") photos.undo();
    else if (isUndo || event.key === "y" || event.key === "Z") photos.redo();
    else if (event.key in steps && !onSlider) this.move(this.current + steps[event.key]);
    else if (event.key === "?") this.help.showModal();
    else if (zoom.node.open || !this.pressOnPage(event)) return;
    event.preventDefault();
  }

  pressOnPage(event) {
    const isOnPhoto = !event.target.closest("button:not(.picture), a, select");
    if (event.key === "[") this.turn(this.page - 1);
    else if (event.key === "]") this.turn(this.page + 1);
    else if (event.key === "/") this.filter.focus();
    else if (event.key === "l") this.byName.focus();
    else if (event.key === "a") this.selectPage();
    else if (event.key === "Escape") this.selectNone();
    else if (event.key === "Enter" && isOnPhoto) this.openZoom(this.current);
    else if (event.key === " " && isOnPhoto && this.onPage.length > 0) this.click(this.current, event);
    else return false;
    return true;
  }

  selectPage() {
    for (const id of this.onPage) this.selected.add(id);
    this.tellSelection();
    this.draw();
  }

  clearSelection() {
    this.selected.clear();
    this.tellSelection();
  }

  selectNone() {
    this.clearSelection();
    this.draw();
  }

  makeZoom() {
    const title = element("h2", { id: "zoom-title" });
    const picture = element("div", { class: "picture" });
    const label = this.makeLabelChoice(() => this.onPage[this.current]);
    const hint = element("span", { class: "muted" });
    const status = element("p", { class: "status", role: "status" });
    const node = element("dialog", { class: "viewer zoomed", "aria-labelledby": "zoom-title", onclose: () => this.focusCurrent() },
      element("div", { class: "viewer-head" }, title, button("Close", () => node.close(), { "aria-label": "Close (Esc)" })),
      picture,
      element("div", { class: "viewer-steps" }, button("←", () => this.move(this.current - 1), { "aria-label": "Previous photo" }),
        labelled("Label", label), button("→", () => this.move(this.current + 1), { "aria-label": "Next photo" })),
      hint, status);
    return { node, title, picture, label, hint, status, id: null };
  }

  openZoom(place) {
    if (this.onPage.length === 0) return;
    this.current = place;
    this.zoom.node.showModal();
    this.draw();
  }

  drawZoom() {
    const { zoom, photos } = this;
    const id = this.onPage[this.current];
    if (!zoom.node.open || id === undefined) return;
    zoom.title.replaceChildren(nameElement(id));
    if (zoom.id !== id) zoom.picture.replaceChildren(pictureOf(photos, id, "whole"));
    zoom.id = id;
    showLabel(zoom.label, photos.labelOf(id));
    zoom.hint.replaceChildren(...this.hints(photos.places.get(id)));
  }
}
