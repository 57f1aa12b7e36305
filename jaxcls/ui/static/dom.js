// Elements made by hand: text is only ever set as text, since names of classes and files may hold anything.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "text") node.textContent = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svgElement(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// A name from outside: isolated, so that right-to-left marks in it turn nothing else around.
export function nameElement(text, attributes = {}) {
  return element("bdi", { class: "name", title: text, text, ...attributes });
}

// For screen readers alone.
export function hiddenText(text) {
  return element("span", { class: "hidden-text", text });
}

export function labelled(text, control, isWide = false) {
  return element("label", { class: isWide ? "field wide" : "field" }, element("span", { text }), control);
}

export function choice(options, attributes = {}) {
  return element("select", attributes, ...options.map(([value, text]) => element("option", { value, text })));
}

export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, text, ...attributes });
}

export function formatNumber(value, digits = 3) {
  return value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(digits);
}

export function formatCount(count, singular, plural = `${singular}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? singular : plural}`;
}

export function isTyping(target) {
  return target.closest("input:not([type=range]), select, textarea") !== null;
}
