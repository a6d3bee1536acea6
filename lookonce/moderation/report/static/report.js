
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const BARS = 50;
const number = new Intl.NumberFormat("en");
const thresholds = data.rules.map((rule) => rule.threshold);
const byId = (id) => document.getElementById(id);
const svg = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);

function make(name, text, ...classes) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (classes.length) element.classList.add(...classes);
  return element;
}

function share(part, whole) {
  return whole ? `${(100 * part / whole).toFixed(1)} %` : "–";
}

function above(rule, threshold) {
  let count = 0;
  for (let bin = Math.round(threshold * rule.bins.length); bin < rule.bins.length; bin++) count += rule.bins[bin];
  return count;
}

function facts() {
  byId("name").textContent = data.name;
  byId("description").textContent = data.description;
  document.title = `${data.name}: moderation report`;
  const errors = data.errors.reduce((sum, one) => sum + one.count, 0);
  const entries = [
    ["images", number.format(data.rows) + (data.complete ? "" : " so far")],
    ["flagged", `${number.format(data.flagged)} (${share(data.flagged, data.rows - errors)})`],
    ["errors", number.format(errors)], ["duplicates", number.format(data.duplicates)],
    ["source", data.source, true], ["model", data.model, true],
    ["policy", data.policy_digest.slice(0, 16)], ["encoder", data.vision.slice(0, 16)],
    ["language model", data.language.slice(0, 16)],
  ];
  for (const [term, value, long] of entries) {
    const group = make("div");
    if (long) group.classList.add("long");
    group.append(make("dt", term), make("dd", value));
    byId("facts").append(group);
  }
}

function histogram(rule, place) {
  const drawing = svg("svg");
  drawing.setAttribute("viewBox", `0 0 ${BARS} 20`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", `Histogram of the scores of ${rule.id}, 0 to 1, square-root scale`);
  const per = rule.bins.length / BARS;
  const sums = Array.from({ length: BARS }, (_, bar) =>
    rule.bins.slice(bar * per, (bar + 1) * per).reduce((sum, count) => sum + count, 0));
  const most = Math.sqrt(Math.max(1, ...sums));
  const bars = sums.map((sum, bar) => {
    const height = 20 * Math.sqrt(sum) / most;
    const rectangle = svg("rect");
    for (const [key, value] of [["x", bar + 0.05], ["y", 20 - height], ["width", 0.9], ["height", height]])
      rectangle.setAttribute(key, value);
    const title = svg("title");
    title.textContent = `${(bar / BARS).toFixed(2)} to ${((bar + 1) / BARS).toFixed(2)}: ${number.format(sum)}`;
    rectangle.append(title);
    drawing.append(rectangle);
    return rectangle;
  });
  const paint = () => bars.forEach((bar, at) => bar.classList.toggle("fired", (at + 0.5) / BARS >= thresholds[place]));
  return [drawing, paint];
}

const repaint = data.rules.map((rule, place) => {
  const row = make("div", undefined, "rule");
  const words = make("div");
  const title = make("h3", rule.id);
  title.append(make("span", rule.severity, "severity", rule.severity));
  words.append(title, make("p", rule.question), make("p", `fires on: ${rule.positive.join(", ")}`));
  if (rule.description) words.append(make("p", rule.description));
  const [drawing, paint] = histogram(rule, place);
  const slider = make("input");
  Object.assign(slider, { type: "range", min: "0.001", max: "1", step: "0.001", value: String(rule.threshold) });
  slider.setAttribute("aria-label", `Threshold of ${rule.id}`);
  slider.dataset.rule = rule.id;
  const chart = make("div");
  chart.append(drawing, slider);
  const count = make("div", undefined, "count");
  row.append(words, chart, count);
  byId("rules").append(row);
  const show = () => {
    slider.value = String(thresholds[place]);
    const fired = above(rule, thresholds[place]);
    count.replaceChildren(make("strong", number.format(fired)),
      make("span", `${share(fired, rule.asked)} at ${thresholds[place].toFixed(3)}`));
    paint();
  };
  slider.addEventListener("input", () => {
    thresholds[place] = Number(slider.value);
    show();
    gallery();
  });
  show();
  return show;
});

function fired(card) {
  return data.rules.map((_, place) => place)
    .filter((place) => card.scores[place] !== null && card.scores[place] >= thresholds[place]);
}

function figure(card, places) {
  const box = make("figure");
  if (card.image) {
    const image = make("img");
    Object.assign(image, { src: card.image, alt: card.source, loading: "lazy" });
    box.append(image);
  } else box.append(make("div", "image not at hand", "none"));
  const caption = make("figcaption", card.source.split("/").slice(-2).join("/"));
  caption.title = card.source;
  const list = make("ul");
  const order = data.rules.map((_, place) => place).filter((place) => card.scores[place] !== null)
    .sort((one, other) => card.scores[other] - card.scores[one]).slice(0, Math.max(4, places.length));
  for (const place of order) {
    const rule = data.rules[place];
    const line = make("li", `${rule.id} ${card.scores[place].toFixed(3)}`);
    line.classList.toggle("fired", places.includes(place));
    if (card.follow_ups[rule.id]) line.append(" ", make("q", card.follow_ups[rule.id]));
    list.append(line);
  }
  if (card.copies) list.append(make("li", `${number.format(card.copies)} more with the same bytes`));
  caption.append(list);
  box.append(caption);
  return box;
}

function gallery() {
  const chosen = byId("filter").value;
  const only = data.rules.findIndex((rule) => rule.id === chosen);
  const found = data.gallery.map((card) => [card, fired(card)])
    .filter(([, places]) => (only < 0 ? places.length : places.includes(only)));
  const rank = ([card, places]) => only < 0 ? Math.max(...places.map((place) => card.scores[place])) : card.scores[only];
  found.sort((one, other) => rank(other) - rank(one));
  byId("gallery").replaceChildren(...found.map(([card, places]) => figure(card, places)));
  byId("shown").textContent = `${number.format(found.length)} of the ${number.format(data.gallery.length)} images kept in this page`;
}

function table(target, head, rows, none) {
  if (!rows.length) return byId(target).append(make("p", none, "hint"));
  const element = make("table");
  const top = make("tr");
  top.append(...head.map((text) => make("th", text)));
  element.append(make("thead"), make("tbody"));
  element.firstChild.append(top);
  for (const row of rows) {
    const line = make("tr");
    line.append(...row.map((value) => typeof value === "number" ? make("td", number.format(value), "number") : make("td", value)));
    element.lastChild.append(line);
  }
  return byId(target).append(element);
}

facts();
byId("filter").append(new Option("any rule", ""), ...data.rules.map((rule) => new Option(rule.id, rule.id)));
byId("filter").addEventListener("change", gallery);
byId("reset").addEventListener("click", () => {
  data.rules.forEach((rule, place) => { thresholds[place] = rule.threshold; });
  repaint.forEach((show) => show());
  gallery();
});
table("errors", ["kind", "images", "for example", "because"], data.errors.flatMap((error) =>
  error.examples.map(([source, message], at) => [at ? "" : error.kind, at ? "" : error.count, source, message])), "None.");
table("repeated", ["first image", "further copies"], data.repeated, "None.");
gallery();
