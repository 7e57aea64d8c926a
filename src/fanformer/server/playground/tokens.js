// Tokens with how sure the model was: by colour, and the alternatives of the one that is pointed at or chosen by keys.

import { placeAfter } from "/page/dom.js";

// Returns the tokens of a chunk's choice, of either route: text, logprob, and alternatives as [text, logprob].
// One that is no whole character is shown by its bytes, as \xe4.
export function tokensOf(choice) {
  const scores = choice.logprobs;
  if (!scores) return [];
  if (scores.content) {
    return scores.content.map((one) => ({
      text: one.token,
      logprob: one.logprob,
      top: one.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return scores.tokens.map((name, index) => ({
    text: shownName(name),
    logprob: scores.token_logprobs[index],
    top: Object.entries(scores.top_logprobs[index] ?? {}).map(([other, logprob]) => [shownName(other), logprob]),
  }));
}

export const shownName = (name) => (name.startsWith("bytes:\\x") ? name.slice(6) : name);
const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return `${value >= 10 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : "under 0.1"}%`;
};
export const quoted = (text) => `\u201c${text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5")}\u201d`;

// From which probability on a token has which of the colours p0 to p9: finer where small models are.
const STEPS = [0, 0.02, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.7, 0.9];

export class TokenView {
  constructor(id, detail) {
    this.tokens = [];
    this.active = -1;
    this.detail = detail;
    this.id = id;
    this.element = document.createElement("div");
    this.element.className = "turn text";
  }

  add(tokens) {
    if (tokens.length && !this.tokens.length) this.#beAList();
    for (const token of tokens) {
      const shown = document.createElement("span");
      const index = this.tokens.length;
      shown.id = `${this.id}-${index}`;
      shown.role = "option";
      shown.ariaSelected = "false";
      shown.textContent = token.text.slice(token.given ?? 0);
      shown.ariaLabel = `${quoted(token.text)} ${percent(token.logprob)}`;
      shown.className = `token p${STEPS.findLastIndex((least) => Math.exp(token.logprob) >= least)}`;
      shown.addEventListener("pointerenter", () => this.#choose(index));
      this.tokens.push(token);
      this.element.append(shown);
    }
  }

  #beAList() {
    this.element.role = "listbox";
    this.element.tabIndex = 0;
    this.element.ariaLabel = "Tokens; arrow keys go through them";
    this.element.addEventListener("focus", () => this.#choose(Math.max(0, this.active)));
    this.element.addEventListener("keydown", (event) => {
      const place = placeAfter(event, this.active, this.tokens.length);
      if (place !== undefined) this.#choose(place);
    });
  }

  #choose(index) {
    const before = this.element.children[this.active];
    if (before) {
      before.classList.remove("active");
      before.ariaSelected = "false";
    }
    this.active = index;
    const shown = this.element.children[index];
    shown.classList.add("active");
    shown.ariaSelected = "true";
    this.element.setAttribute("aria-activedescendant", shown.id);
    const token = this.tokens[index];
    const others = token.top
      .filter(([text]) => text !== token.text)
      .sort((one, other) => other[1] - one[1])
      .map(([text, logprob]) => `${quoted(text)} ${percent(logprob)}`);
    this.detail.textContent = `${quoted(token.text)} ${percent(token.logprob)}; others: ${others.join(", ") || "none told"}`;
  }
}
