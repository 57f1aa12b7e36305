// Where the pictures come from: embedded thumbnails, or who answers the view. Each is a function that fills an image.

import { element } from "./dom.js";

export class EmbeddedPhotos {
  constructor({ type, encoded }) {
    this.type = type;
    this.encoded = encoded;
  }

  thumbnail(i) {
    return this.encoded[i] === null ? null : (image) => (image.src = `data:${this.type};base64,${this.encoded[i]}`);
  }

  whole(i) {
    return this.thumbnail(i);
  }
}

// The browser keeps what it has shown: the version tells it the photos of another page, which had this address before.
export class ServedPhotos {
  constructor(server, version) {
    Object.assign(this, { server, version });
  }

  thumbnail(i) {
    return (image) => this.server.show(image, `thumbnails/${i}?v=${this.version}`);
  }

  whole(i) {
    return (image) => this.server.show(image, `photos/${i}?v=${this.version}`);
  }
}

// Beside the picture there is its name in text: to a screen reader it adds nothing.
export function imageElement(source, attributes = {}) {
  const node = element("img", { alt: "", draggable: "false", ...attributes });
  source(node);
  return node;
}

export function pictureElement(results, source, i, attributes = {}) {
  if (results.errors[i] !== undefined) return element("span", { class: "no-picture", text: "unreadable" });
  if (source === null) return element("span", { class: "no-picture", text: "not embedded" });
  return imageElement(source, attributes);
}
