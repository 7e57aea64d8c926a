// How the heads of one block attend: a map a head, and for the token that is pointed at where it looks.

import { make, placeAfter } from "/page/dom.js";
import { quoted, shownName } from "/page/tokens.js";

// From which share on a token has which of the colours p9 to p0.
const STEPS = [0, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.65];
const LARGEST = 5;
const percent = (share) => `${share >= 0.1 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)}%`;

// Draws rows of shares, one a token, as a square: a column for each token that is looked at.
function map(rows) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = rows.length;
  canvas.ariaHidden = "true"; // what it shows is told in words beside it
  const drawing = canvas.getContext("2d");
  const image = drawing.createImageData(rows.length, rows.length);
  rows.forEach((row, y) =>
    row.forEach((share, x) => (image.data[4 * (y * rows.length + x) + 3] = 255 * Math.sqrt(share))),
  );
  drawing.putImageData(image, 0, 0);
  return canvas;
}

// Tells where a head looks on average, over all tokens but the first, which has no choice.
function habits(rows) {
  const later = rows.slice(1);
  const mean = (share) => percent(later.reduce((sum, row, i) => sum + share(row, i + 1), 0) / Math.max(1, later.length));
  const itself = mean((row, place) => row[place]);
  const before = mean((row, place) => (place > 1 ? row[place - 1] : 0));
  return `${mean((row) => row[0])} first, ${before} the one before, ${itself} itself`;
}

export class AttentionView {
  constructor(model, attention) {
    const { layer, heads } = attention;
    const tokens = attention.tokens.map(shownName);
    this.tokens = tokens;
    this.heads = heads;
    this.head = 0;
    this.active = tokens.length - 1;
    this.element = make("section", "attention");
    this.element.ariaLabel = `Attention of block ${layer}`;
    const about = make("p", "quiet", `${model}, block ${layer}, the first ${tokens.length} tokens. In a map each row is `);
    about.append("a token, and each column one that it looks at. Choose a head, then go through the tokens.");
    const choice = make("fieldset", "heads");
    choice.append(make("legend", "", "Head, and where it looks on average"), ...heads.map((rows, index) => this.#radio(rows, index)));
    this.list = make("div", "turn text");
    this.list.role = "listbox";
    this.list.tabIndex = 0;
    this.list.ariaLabel = "Tokens; arrow keys go through them";
    this.list.append(...tokens.map((token, index) => this.#option(token, index)));
    this.list.addEventListener("keydown", (event) => this.#move(event));
    this.detail = make("p", "detail");
    this.detail.setAttribute("aria-live", "polite");
    this.element.append(about, choice, this.list, this.detail);
    this.#show();
  }

  #radio(rows, index) {
    const label = document.createElement("label");
    const radio = document.createElement("input");
    radio.type = "radio";
    radio.name = "head";
    radio.checked = index === 0;
    radio.addEventListener("change", () => {
      this.head = index;
      this.#show();
    });
    label.append(map(rows), radio, ` ${index}: ${habits(rows)}`);
    return label;
  }

  #option(token, index) {
    const shown = document.createElement("span");
    shown.id = `attention-${index}`;
    shown.role = "option";
    shown.textContent = token;
    shown.ariaLabel = quoted(token);
    shown.addEventListener("pointerenter", () => this.#choose(index));
    return shown;
  }

  #move(event) {
    const place = placeAfter(event, this.active, this.tokens.length);
    if (place !== undefined) this.#choose(place);
  }

  #choose(index) {
    this.active = index;
    this.#show();
  }

  #show() {
    const row = this.heads[this.head][this.active];
    this.tokens.forEach((token, index) => {
      const shown = this.list.children[index];
      const isActive = index === this.active;
      const level = 9 - STEPS.findLastIndex((least) => (row[index] ?? 0) >= least);
      shown.className = `token p${level}${isActive ? " active" : ""}`;
      shown.ariaSelected = String(isActive);
    });
    this.list.setAttribute("aria-activedescendant", `attention-${this.active}`);
    const largest = row.map((share, index) => [share, index]).sort((one, other) => other[0] - one[0]);
    const told = largest.slice(0, LARGEST).map(([share, index]) => `${quoted(this.tokens[index])} ${percent(share)}`);
    this.detail.textContent = `${quoted(this.tokens[this.active])} in head ${this.head} looks at ${told.join(", ")}`;
  }
}
