// Where the pictures come from: embedded thumbnails, or the server of a page.

import { element } from "./dom.js";

export class EmbeddedPhotos {
  constructor({ type, encoded }) {
    this.type = type;
    this.encoded = encoded;
  }

  thumbnail(i) {
    return this.encoded[i] === null ? null : `data:${this.type};base64,${this.encoded[i]}`;
  }

  whole(i) {
    return this.thumbnail(i);
  }
}

// The browser keeps what it has shown: the version tells it the photos of another page, which had this address before.
export class ServedPhotos {
  constructor(version) {
    this.version = version;
  }

  thumbnail(i) {
    return `thumbnails/${i}?v=${this.version}`;
  }

  whole(i) {
    return `photos/${i}?v=${this.version}`;
  }
}

// Beside the picture there is its name in text: to a screen reader it adds nothing.
export function pictureElement(results, source, i) {
  if (results.errors[i] !== undefined) return element("span", { class: "no-picture", text: "unreadable" });
  if (source === null) return element("span", { class: "no-picture", text: "not embedded" });
  return element("img", { src: source, alt: "", draggable: "false" });
}
