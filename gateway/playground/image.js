// The image: chosen, dropped, pasted or a sample; uploaded once; erased everywhere.

import { drawBoxes } from "./boxes.js";
import { $, announce, el, ms, showError } from "./dom.js";
import { Prices } from "./timing.js";

const ARMED_MS = 5000;

export class ImagePanel extends EventTarget {
  image = null; // as the API shows it
  prices = new Prices();
  suggestions = [];
  #api;
  #upload = null;
  #disarm = 0;

  constructor(api) {
    super();
    this.#api = api;
    $("file").addEventListener("change", () => this.#take($("file").files));
    $("change").addEventListener("click", () => this.choose());
    $("erase").addEventListener("click", () => this.#eraseClicked());
    document.addEventListener("paste", (event) => this.#take(event.clipboardData.files, event));
    document.addEventListener("dragover", (event) => this.#hover(event));
    document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) this.#over(false); });
    document.addEventListener("drop", (event) => this.#dropped(event));
  }

  choose() {
    $("file").value = "";
    $("file").click();
  }

  showBoxes(boxes) {
    drawBoxes($("boxes"), boxes, this.image);
  }

  disarm() {
    clearTimeout(this.#disarm);
    $("erase").classList.remove("armed");
    $("erase").textContent = "Erase";
  }

  async showSamples() {
    const samples = await this.#api.samples();
    for (const sample of samples) {
      const thumbnail = el("img", { src: sample.url, alt: "", loading: "lazy" });
      const button = el("button", { type: "button", title: sample.name, "aria-label": `Sample ${sample.name}` }, thumbnail);
      button.addEventListener("click", () => this.#takeSample(sample));
      $("sample-list").append(el("li", {}, button));
    }
    $("samples").hidden = samples.length === 0;
  }

  async load(file, suggestions = []) {
    this.#upload?.abort();
    const upload = (this.#upload = new AbortController());
    this.#forget();
    this.#show(file);
    try {
      const image = await this.#api.upload(file, upload.signal);
      if (upload.signal.aborted) return;
      this.image = image;
      this.suggestions = suggestions;
      if (!image.cached) this.prices.learn({ encode_ms: image.encode_ms });
      this.#facts(image);
      this.dispatchEvent(new Event("ready"));
    } catch (error) {
      if (upload.signal.aborted) return;
      this.#hide();
      showError($("image-error"), error);
    } finally {
      if (!upload.signal.aborted) this.#working(false);
    }
  }

  async #takeSample(sample) {
    try {
      const reply = await fetch(sample.url);
      if (!reply.ok) throw new Error("The sample can't be loaded.");
      await this.load(await reply.blob(), sample.questions);
    } catch (error) {
      showError($("image-error"), error);
    }
  }

  #take(files, event) {
    if (!files.length) return;
    event?.preventDefault();
    this.load(files[0]);
  }

  #hover(event) {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    this.#over(true);
  }

  #dropped(event) {
    this.#over(false);
    this.#take(event.dataTransfer.files, event);
  }

  #over(yes) {
    $("drop").classList.toggle("over", yes);
  }

  async #eraseClicked() {
    if (!$("erase").classList.contains("armed")) {
      $("erase").classList.add("armed");
      $("erase").textContent = "Click again to erase";
      announce("Click again to erase the image everywhere.");
      this.#disarm = setTimeout(() => this.disarm(), ARMED_MS);
      return;
    }
    this.disarm();
    $("erase").disabled = true;
    try {
      const { complete } = await this.#api.erase(this.image.id);
      this.#forget();
      this.#hide();
      this.dispatchEvent(new CustomEvent("erased", { detail: { complete } }));
    } catch (error) {
      showError($("image-error"), error);
    } finally {
      $("erase").disabled = false;
    }
  }

  #show(file) {
    this.#release();
    $("preview").src = URL.createObjectURL(file);
    $("preview").alt = file.name ? `The image ${file.name}` : "The image";
    $("preview").hidden = false;
    $("drop").classList.add("filled");
    this.#working(true);
  }

  #hide() {
    this.#release();
    $("preview").hidden = true;
    $("drop").classList.remove("filled");
    $("file").value = "";
  }

  #release() {
    if ($("preview").src) URL.revokeObjectURL($("preview").src);
    $("preview").removeAttribute("src");
  }

  #forget() {
    this.showBoxes([]);
    this.image = null;
    this.prices = new Prices();
    this.disarm();
    $("facts").hidden = $("image-actions").hidden = true;
    showError($("image-error"), null);
  }

  #working(yes) {
    $("image-busy").hidden = !yes;
    $("drop").classList.toggle("working", yes);
    $("drop").setAttribute("aria-busy", String(yes));
  }

  #facts(image) {
    $("fact-size").textContent = `${image.width} × ${image.height}`;
    $("fact-tokens").textContent = image.tokens.toLocaleString("en");
    $("fact-encode").textContent = image.cached ? "cached" : ms(image.encode_ms);
    $("facts").hidden = $("image-actions").hidden = false;
  }
}
