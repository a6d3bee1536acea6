// One answer on the page: written as its tokens come, then its badges, timing and choices.

import { describe, el } from "./dom.js";
import { badges, timing } from "./timing.js";

export class AnswerCard {
  constructor(question) {
    this.node = el("li", { className: "card answer waiting" });
    this.text = el("p", { className: "text", dir: "auto" });
    this.node.append(el("p", { className: "asked", dir: "auto" }, question), this.text);
  }

  write(piece) {
    this.node.classList.replace("waiting", "writing");
    this.text.append(piece);
  }

  // `answer`: {receipt, usage, choices}; its text is taken only if none was written.
  finish(answer, decodeMs, prices) {
    this.#settle();
    if (answer.choices) {
      this.text.replaceWith(bars(answer.choices));
    } else if (answer.text !== undefined && !this.text.hasChildNodes()) {
      this.text.textContent = answer.text;
    }
    if (!answer.choices && !this.text.textContent) this.text.textContent = "(an empty answer)";
    if (!answer.receipt) return;
    this.node.append(badges(answer.receipt), ...timing(answer.receipt, answer.usage, decodeMs, prices));
  }

  // Draws its boxes now, and again at a click.
  offer(boxes, draw) {
    const text = boxes.length === 1 ? "Show the box" : `Show ${boxes.length} boxes`;
    const button = el("button", { type: "button", className: "quiet show-boxes" }, text);
    button.addEventListener("click", draw);
    this.text.after(button);
    draw();
  }

  fail(error) {
    this.#settle();
    if (!this.text.hasChildNodes()) this.text.remove();
    this.node.append(el("p", { className: "error" }, describe(error)));
  }

  stop() {
    this.#settle();
    this.text.append(" (stopped)");
  }

  get unfinished() {
    return this.node.classList.contains("waiting") || this.node.classList.contains("writing");
  }

  #settle() {
    this.node.classList.remove("waiting", "writing");
  }
}

function bars(choices) {
  const best = Math.max(...Object.values(choices));
  const list = el("div", { className: "choices" });
  for (const [choice, probability] of Object.entries(choices)) {
    const percent = `${(probability * 100).toFixed(1)} %`;
    const fill = el("i");
    fill.style.width = `${probability * 100}%`;
    const row = el("div", { className: probability === best ? "choice best" : "choice" });
    row.append(el("span", { dir: "auto" }, choice), el("div", { className: "bar" }, fill), el("output", {}, percent));
    list.append(row);
  }
  return list;
}
