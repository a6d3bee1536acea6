// What an answer cost and what reuse saved it, from its receipt.

import { el, ms } from "./dom.js";

// What has been measured of an image: the price of doing things that were reused later.
export class Prices {
  encodeMs = null;
  msPerToken = null;

  learn(receipt) {
    if (receipt.encode_ms > 0) this.encodeMs = receipt.encode_ms;
    const prefill = receipt.ttft_ms - receipt.queue_ms;
    if (receipt.prefix === "miss" && receipt.prefill_tokens > 0 && prefill > 0) {
      const price = prefill / receipt.prefill_tokens; // the least that was seen: others shared a batch
      this.msPerToken = Math.min(this.msPerToken ?? Infinity, price);
    }
  }

  saved(receipt) {
    const encode = receipt.embedding === "hit" ? this.encodeMs : 0;
    const prefill = this.msPerToken === null ? null : receipt.cached_tokens * this.msPerToken;
    return { encode, prefill: receipt.cached_tokens ? prefill : 0 };
  }
}

export function badges(receipt) {
  const list = el("p", { className: "badges" });
  if (receipt.embedding) list.append(badge("embedding", receipt.embedding, EMBEDDING[receipt.embedding]));
  list.append(badge("prefix", receipt.prefix, PREFIX[receipt.prefix]));
  return list;
}

const EMBEDDING = {
  hit: "The image was not encoded again",
  miss: "The image was encoded for this answer",
  coalesced: "Another request was encoding the image; this one waited for it",
};
const PREFIX = {
  hit: "Prefill began from keys and values kept from an earlier answer",
  miss: "The whole prompt went through prefill",
};

function badge(what, outcome, title) {
  return el("span", { className: `badge ${outcome}`, title }, `${what} ${outcome}`);
}

// The bar, its legend, and a line on what reuse saved. `decodeMs` is what the page measured.
export function timing(receipt, usage, decodeMs, prices) {
  const saved = prices.saved(receipt);
  const spent = [
    ["queue", receipt.queue_ms, "Waiting for a place in the batch"],
    ["encode", receipt.encode_ms, "Vision encoder"],
    ["prefill", Math.max(0, receipt.ttft_ms - receipt.queue_ms), "Until the first token"],
    ["decode", decodeMs, "From the first token to the last, as this page saw it"],
  ].filter(([, value]) => value >= 0.05);
  const avoided = (saved.encode ?? 0) + (saved.prefill ?? 0);
  const words = spent.map(([name, value]) => `${name} ${ms(value)}`);
  const bar = el("div", { className: "timing", role: "img", "aria-label": words.join(", ") || "no time" });
  for (const [name, value] of spent) bar.append(segment(name, value));
  if (avoided > 0) bar.append(segment("saved", avoided));
  const total = spent.reduce((sum, [, value]) => sum + value, 0);
  const legend = el("p", { className: "legend" }, el("strong", { title: "All of it" }, ms(total)));
  for (const [name, value, title] of spent) legend.append(entry(name, `${name} ${ms(value)}`, title));
  if (avoided > 0) legend.append(entry("saved", `saved ≈ ${ms(avoided)}`, "What was reused would have cost this"));
  const parts = [bar, legend];
  const line = savings(receipt, usage, saved);
  if (line) parts.push(el("p", { className: "savings" }, line));
  return parts;
}

function segment(name, value) {
  const part = el("i", { className: name });
  part.style.flexGrow = String(value);
  return part;
}

function entry(name, text, title) {
  return el("span", { title }, el("i", { className: name }), text);
}

function savings(receipt, usage, saved) {
  const parts = [];
  if (receipt.embedding === "hit") parts.push(saved.encode ? `the encoding (${ms(saved.encode)})` : "the encoding");
  if (receipt.cached_tokens) parts.push(`${receipt.cached_tokens} of ${usage.prompt_tokens} prompt tokens`);
  return parts.length ? `Reused ${parts.join(" and ")}.` : "";
}
