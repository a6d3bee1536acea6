// Tabs with the keys that the ARIA pattern has: arrows, Home, End. https://www.w3.org/WAI/ARIA/apg/patterns/tabs/

import { $ } from "./dom.js";

export class Tabs {
  #tabs;
  #fields;
  #current = 0;

  // `pairs`: ids of each tab and of the field that its panel is for.
  constructor(pairs) {
    this.#tabs = pairs.map(([tab]) => $(tab));
    this.#fields = pairs.map(([, field]) => $(field));
    this.#tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => this.go(place));
      tab.addEventListener("keydown", (event) => this.#onKey(event));
    });
  }

  // Shows a panel and goes to its field.
  go(place) {
    this.#select(place);
    this.focusField();
  }

  focusField() {
    this.#fields[this.#current].focus();
  }

  #onKey(event) {
    const last = this.#tabs.length - 1;
    const moves = { ArrowRight: this.#current + 1, ArrowLeft: this.#current - 1, Home: 0, End: last };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.#select((moves[event.key] + last + 1) % (last + 1));
    this.#tabs[this.#current].focus();
  }

  #select(place) {
    this.#current = place;
    this.#tabs.forEach((tab, number) => {
      tab.setAttribute("aria-selected", String(number === place));
      tab.tabIndex = number === place ? 0 : -1;
      $(tab.getAttribute("aria-controls")).hidden = number !== place;
    });
  }
}
