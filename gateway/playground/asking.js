// Questions on their way: one as a stream of tokens, many in order of completion, one weighed by its choices.

import { $, announce, showError } from "./dom.js";
import { AnswerCard } from "./answer.js";
import { ApiError } from "./api.js";
import { boxesIn } from "./boxes.js";

export class Asking {
  family = ""; // of the model, once it is known
  #api;
  #panel;
  #running = new Set();

  constructor(api, panel) {
    this.#api = api;
    this.#panel = panel;
  }

  async one(question, options) {
    await this.#run([question], async ([card], signal) => {
      const answer = {};
      let first = 0;
      let last = 0;
      for await (const chunk of this.#api.chat(this.#image, question, options, signal)) {
        const piece = chunk.choices?.[0]?.delta.content;
        if (piece) {
          last = performance.now();
          first ||= last;
          card.write(piece);
        }
        if (chunk.receipt) answer.receipt = chunk.receipt;
        if (chunk.usage) answer.usage = chunk.usage;
      }
      this.#finish(card, answer, last - first);
      announce(`Answer: ${card.text.textContent}`);
    });
  }

  async many(questions, options) {
    await this.#run(questions, async (cards, signal) => {
      const begun = performance.now();
      let done = 0;
      for await (const answer of this.#api.askAll(this.#image, questions, options, signal)) {
        const card = cards[Number(answer.id)];
        if (answer.error) card.fail(new ApiError(answer.error.message));
        else this.#finish(card, answer, rest(answer.receipt, performance.now() - begun));
        done += 1;
        $("tally").textContent = `${done} of ${questions.length}`;
      }
      $("tally").textContent = `${done} of ${questions.length} in ${((performance.now() - begun) / 1000).toFixed(2)} s`;
      announce(`${done} answers.`);
    });
  }

  async score(question, choices) {
    await this.#run([question], async ([card]) => {
      const [answer] = await this.#api.ask(this.#image, [{ text: question, choices }], {});
      if (answer.error) throw new ApiError(answer.error.message);
      this.#finish(card, answer, 0);
      announce(`Most likely: ${answer.text}`);
    });
  }

  stop() {
    for (const run of this.#running) run.abort();
  }

  get #image() {
    return this.#panel.image.id;
  }

  #finish(card, answer, decodeMs) {
    if (answer.receipt) this.#panel.prices.learn(answer.receipt);
    card.finish(answer, decodeMs, this.#panel.prices);
    const boxes = boxesIn(card.text.textContent, this.#panel.image, this.family);
    if (boxes.length) card.offer(boxes, () => this.#panel.showBoxes(boxes));
  }

  // Shows a card for each question, does the work, and settles whatever it left unfinished.
  async #run(questions, work) {
    showError($("ask-error"), null);
    const run = new AbortController();
    const cards = questions.map((question) => new AnswerCard(question));
    this.#show(cards);
    this.#begin(run);
    try {
      await work(cards, run.signal);
    } catch (error) {
      for (const card of cards.filter((one) => one.unfinished)) {
        if (run.signal.aborted) card.stop();
        else card.fail(error);
      }
      announce(run.signal.aborted ? "Stopped." : `Error: ${error.message}`);
    } finally {
      this.#end(run);
    }
  }

  #show(cards) {
    $("empty").hidden = true;
    $("answers-head").hidden = false;
    $("tally").textContent = "";
    $("answers").prepend(...cards.map((card) => card.node));
  }

  #begin(run) {
    this.#running.add(run);
    $("stop").hidden = false;
  }

  #end(run) {
    this.#running.delete(run);
    $("stop").hidden = this.#running.size === 0;
  }
}

// Time of an answer that no receipt tells: decoding, and the way here.
function rest(receipt, elapsed) {
  return Math.max(0, elapsed - receipt.encode_ms - receipt.ttft_ms);
}
