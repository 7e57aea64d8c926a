// One model's column: what was said, the answer as it comes, and what it took.

import { ServerError, stream } from "/page/client.js";
import { make } from "/page/dom.js";
import { TokenView, tokensOf } from "/page/tokens.js";

let panes = 0;

// Returns what stands for the pictures and recordings of a message: the pictures themselves, and words.
function shownMedia(turn) {
  const media = Array.isArray(turn.content) ? turn.content.filter((part) => part.type !== "text") : [];
  return media.map((part, index) => {
    if (!part.image_url) return make("span", "quiet", `[${turn.names[index]}] `);
    const image = new Image();
    image.src = part.image_url.url;
    image.alt = turn.names[index];
    return image;
  });
}

export class Pane {
  // turns: {role: "given" | "text" | "user" | "assistant", text, tokens}; of a user's, `content` and `names` of media
  constructor(model, turns = []) {
    this.model = model;
    this.turns = turns;
    turns.forEach((turn) => delete turn.isComing); // it ended with the page before
    this.id = `pane-${panes++}`;
    this.element = make("article", "pane");
    const head = make("header");
    const name = make("h2", "", model);
    name.id = `${this.id}-name`;
    this.element.setAttribute("aria-labelledby", name.id);
    head.append(name);
    this.answer = make("div", "answer");
    this.answer.tabIndex = 0;
    this.answer.role = "log";
    this.answer.ariaLive = "off"; // the end is told, not every piece
    this.answer.ariaLabel = `Answer of ${model}`;
    this.detail = make("p", "detail quiet", "Point at a token, or go through them with the arrow keys.");
    this.detail.setAttribute("aria-live", "polite");
    this.about = make("p", "about quiet");
    this.about.role = "status";
    this.element.append(head, this.answer, this.detail, this.about);
  }

  clear() {
    this.turns = [];
    this.about.textContent = "";
  }

  show(isSure) {
    this.isSure = isSure;
    this.detail.hidden = !isSure;
    this.answer.replaceChildren();
    this.turns.forEach((turn) => this.#open(turn));
  }

  // Shows a turn; what is added to it afterwards goes to `view`.
  #open(turn) {
    const hasTokens = this.isSure && (turn.tokens.length > 0 || turn.isComing);
    if (hasTokens) {
      this.view = new TokenView(`${this.id}-${this.answer.children.length}`, this.detail);
      this.view.element.classList.add(turn.role);
      this.view.add(turn.tokens);
      this.answer.append(this.view.element);
    } else {
      this.view = null;
      this.plain = make("div", `turn ${turn.role}`);
      this.plain.append(...shownMedia(turn), turn.text);
      this.answer.append(this.plain);
    }
  }

  // Asks for an answer and shows it as it comes; returns whether it is whole, and whether it is kept: a question that
  // failed before its answer began is taken back, so that the next one does not repeat it.
  async ask(path, body, given, role, signal) {
    this.turns.push(given);
    this.#open(given);
    this.spaces = role === "text" ? given.text.length - given.text.replace(/ +$/, "").length : 0;
    const turn = { role, text: "", tokens: [], isComing: true };
    this.turns.push(turn);
    this.#open(turn);
    this.about.classList.remove("failed");
    this.about.textContent = "waiting";
    this.answer.ariaBusy = "true";
    const figures = { begun: performance.now(), first: null, tokens: 0, reason: null };
    try {
      for await (const chunk of stream(path, { ...body, model: this.model }, signal)) {
        this.#add(turn, chunk, figures);
      }
      this.about.textContent = this.#told(turn, figures);
      return { isWhole: true, isKept: true };
    } catch (error) {
      const isStopped = error.name === "AbortError";
      if (!isStopped && !(error instanceof ServerError)) throw error;
      this.about.classList.toggle("failed", !isStopped);
      this.about.textContent = isStopped ? `stopped after ${figures.tokens} tokens` : error.message;
      const isKept = isStopped || turn.text !== "";
      if (!isKept) {
        this.turns = this.turns.filter((one) => one !== given && one !== turn);
        this.show(this.isSure);
      }
      return { isWhole: false, isKept };
    } finally {
      delete turn.isComing;
      this.answer.ariaBusy = "false";
    }
  }

  #add(turn, chunk, figures) {
    const [choice] = chunk.choices;
    if (!choice) return;
    const text = choice.text ?? choice.delta?.content ?? "";
    const tokens = tokensOf(choice);
    if (tokens.length && !turn.tokens.length) {
      // spaces at the end of a prompt may belong to the first new token: the text lacks them, for they stand there
      const whole = tokens.map((token) => token.text).join("");
      const lacking = whole.endsWith(text) ? whole.length - text.length : 0;
      tokens[0].given = Math.min(this.spaces, lacking, tokens[0].text.search(/[^ ]|$/));
    }
    figures.first ??= tokens.length ? performance.now() : null;
    figures.tokens += tokens.length;
    figures.reason = choice.finish_reason ?? figures.reason;
    turn.text += text;
    turn.tokens.push(...tokens);
    const { scrollTop, scrollHeight, clientHeight } = this.answer;
    const isAtEnd = scrollTop + clientHeight > scrollHeight - 30;
    if (this.view) this.view.add(tokens);
    else this.plain.append(text);
    if (isAtEnd) this.answer.scrollTop = this.answer.scrollHeight;
    this.about.textContent = `${figures.tokens} tokens`;
  }

  #told(turn, figures) {
    const seconds = (performance.now() - (figures.first ?? figures.begun)) / 1000;
    const rate = figures.tokens > 1 ? `, ${((figures.tokens - 1) / Math.max(seconds, 1e-3)).toFixed(0)} tokens/s` : "";
    const bits = -turn.tokens.reduce((sum, token) => sum + token.logprob, 0) / Math.LN2 / Math.max(1, figures.tokens);
    const reason = { stop: "it ended", length: "as long as asked for" }[figures.reason] ?? figures.reason;
    return `${figures.tokens} tokens${rate}, ${bits.toFixed(1)} bits each; ${reason}`;
  }
}
