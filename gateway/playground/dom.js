// Small helpers for the page. Text always goes in as text.

export const $ = (id) => document.getElementById(id);

export function el(tag, { className, title, ...rest } = {}, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (title) node.title = title;
  for (const [name, value] of Object.entries(rest)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Said by screen readers, shown nowhere.
export function announce(text) {
  $("status").textContent = text;
}

// Shows an error in its place; null takes it away.
export function showError(place, error) {
  place.hidden = !error;
  place.textContent = error ? describe(error) : "";
}

export function describe(error) {
  const text = error.message ?? String(error);
  const sentence = text.charAt(0).toUpperCase() + text.slice(1);
  return error.requestId ? `${sentence} (request ${error.requestId})` : sentence;
}

export function ms(value) {
  if (value >= 10000) return `${(value / 1000).toFixed(1)} s`;
  if (value >= 100) return `${Math.round(value).toLocaleString("en")} ms`;
  return `${value >= 10 ? Math.round(value) : value.toFixed(1)} ms`;
}
