// Boxes that an answer grounds its words with, read from its text and drawn over the image.
//
// Qwen2-VL writes <|object_ref_start|>name<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|> in thousandths of
// the sides. Qwen2.5-VL and Qwen3-VL write JSON with bbox_2d: the former in pixels of the resized image.

const MARKUP = /<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|<\|box_start\|>(.*?)<\|box_end\|>/gs;
const OBJECT = /\{[^{}]*"bbox_2d"\s*:\s*\[([^\]]*)\][^{}]*\}/g;
const LABEL = /"label"\s*:\s*("(?:[^"\\]|\\.)*")/;
const THOUSAND = 1000;
const TOKEN_SIDE = 28; // pixels of the resized image that are one token of Qwen2.5-VL
const COLOURS = 5;
const SVG = "http://www.w3.org/2000/svg";

// The boxes in a text as [{label, x, y, width, height}], in shares of the image's sides. `image` has width, height
// and tokens; `family` is the model's, as /v1/models says it.
export function boxesIn(text, image, family) {
  const found = [...marked(text), ...listed(text)];
  const [columns, rows] = image ? cells(image) : [0, 0];
  return found.map(({ label, corners, json }) => {
    const inPixels = json && arePixels(family, found);
    const across = inPixels ? columns * TOKEN_SIDE : THOUSAND;
    const down = inPixels ? rows * TOKEN_SIDE : THOUSAND;
    const [left, right] = [corners[0] / across, corners[2] / across].map(share).sort((a, b) => a - b);
    const [top, bottom] = [corners[1] / down, corners[3] / down].map(share).sort((a, b) => a - b);
    return { label, x: left, y: top, width: right - left, height: bottom - top };
  });
}

// Shows boxes over the image and takes away those before.
export function drawBoxes(layer, boxes, image) {
  layer.replaceChildren();
  layer.toggleAttribute("hidden", boxes.length === 0);
  if (!boxes.length) return;
  const { width, height } = image;
  layer.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const size = 0.035 * Math.max(width, height);
  const labels = [...new Set(boxes.map((box) => box.label))];
  for (const box of boxes) {
    const colour = `colour-${labels.indexOf(box.label) % COLOURS}`;
    const [x, y] = [box.x * width, box.y * height];
    const rect = { class: colour, x, y, width: box.width * width, height: box.height * height };
    const place = { class: colour, x: x + size / 3, y: y + size * 1.1, "font-size": size };
    layer.append(shape("rect", rect), shape("text", place, box.label));
  }
}

function* marked(text) {
  let label = "";
  for (const [, name, inside] of text.matchAll(MARKUP)) {
    if (name !== undefined) label = name.trim();
    else yield* whole(label, numbers(inside), false);
  }
}

function* listed(text) {
  for (const [object, inside] of text.matchAll(OBJECT)) {
    yield* whole(named(object), numbers(inside), true);
  }
}

// Nothing is drawn of what has not four numbers.
function* whole(label, corners, json) {
  if (corners.length === 4) yield { label, corners, json };
}

function named(object) {
  try {
    return JSON.parse(LABEL.exec(object)?.[1] ?? '""');
  } catch {
    return "";
  }
}

function numbers(text) {
  return (text.match(/-?\d+(\.\d+)?/g) ?? []).map(Number);
}

// Where the family tells nothing, only pixels can be above a thousand.
function arePixels(family, found) {
  if (family === "qwen2_5_vl") return true;
  if (family.startsWith("qwen3")) return false;
  return found.some(({ json, corners }) => json && Math.max(...corners) > THOUSAND);
}

// Columns and rows of an image's tokens: those whose ratio is nearest to the image's.
function cells({ width, height, tokens }) {
  let best = [1, tokens];
  const far = ([columns, rows]) => Math.abs(Math.log((columns * height) / (rows * width)));
  for (let columns = 1; columns <= tokens; columns += 1) {
    const pair = [columns, tokens / columns];
    if (tokens % columns === 0 && far(pair) < far(best)) best = pair;
  }
  return best;
}

function share(value) {
  return Math.min(1, Math.max(0, value));
}

function shape(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
