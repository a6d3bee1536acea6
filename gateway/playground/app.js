// The page: builds the parts, and turns clicks and keys into what they do.

import { Api } from "./api.js";
import { Asking } from "./asking.js";
import { $, announce, showError } from "./dom.js";
import { ImagePanel } from "./image.js";
import { Tabs } from "./tabs.js";

const TEN = [
  "What is in this image?",
  "What is in the foreground?",
  "What is in the background?",
  "Which colours stand out?",
  "How many objects are there?",
  "Is there a person?",
  "Is there any text? If so, what does it say?",
  "Where could this be?",
  "What is the largest object?",
  "Describe the image in one sentence.",
];
const MAX_QUESTIONS = 1000;

const api = new Api(askForKey);
const panel = new ImagePanel(api);
const asking = new Asking(api, panel);
const tabs = new Tabs([["tab-one", "question"], ["tab-many", "questions"], ["tab-score", "score-question"]]);
let edited = false;

function options() {
  const chosen = { max_tokens: $("max-tokens").valueAsNumber || 128, temperature: $("temperature").valueAsNumber || 0 };
  return $("with-boxes").checked ? { ...chosen, skip_special_tokens: false } : chosen;
}

// Runs `ask` if there are an image and a question; otherwise says what is missing, and goes there.
function submit(field, ask) {
  return (event) => {
    event.preventDefault();
    const text = $(field).value.trim();
    if (!panel.image) {
      showError($("ask-error"), new Error("Choose an image first."));
      $("file").focus();
    } else if (!text) {
      showError($("ask-error"), new Error("Write a question first."));
      $(field).focus();
    } else {
      ask(text);
    }
  };
}

function askMany(text) {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  if (lines.length > MAX_QUESTIONS) {
    showError($("ask-error"), new Error(`These are ${lines.length} questions; the limit is ${MAX_QUESTIONS}.`));
    return;
  }
  asking.many(lines, options());
}

function score(text) {
  const choices = [...new Set($("choices").value.split(",").map((choice) => choice.trim()).filter(Boolean))];
  if (choices.length < 2) {
    showError($("ask-error"), new Error("Give two or more different choices, separated by commas."));
    $("choices").focus();
    return;
  }
  asking.score(text, choices);
}

function suggest() {
  const own = panel.suggestions.slice(0, 10);
  $("questions").value = [...own, ...TEN.filter((line) => !own.includes(line))].slice(0, 10).join("\n");
  edited = false;
}

function clearAnswers() {
  asking.stop();
  $("answers").replaceChildren();
  $("answers-head").hidden = true;
  $("empty").hidden = false;
}

// Shows the form; resolves when a key is given.
function askForKey(refused) {
  const form = $("key-form");
  form.hidden = false;
  $("key-hint").classList.toggle("wrong", refused);
  if (refused) $("key-hint").textContent = "That key was refused. Try another one.";
  announce(refused ? "The key was refused." : "An API key is needed.");
  $("key").focus();
  return new Promise((resolve) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.hidden = true;
      resolve($("key").value.trim());
      $("key").value = "";
      $("question").focus();
    }, { once: true });
  });
}

function onKey(event) {
  if (event.key === "Escape") {
    asking.stop();
    panel.disarm();
    return;
  }
  const typing = event.target.matches("input:not([type=file]), textarea");
  if (typing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.target.form?.requestSubmit();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = { o: () => panel.choose(), "/": () => tabs.focusField(), 1: () => tabs.go(0), 2: () => tabs.go(1), 3: () => tabs.go(2) };
  const action = keys[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  action();
}

async function greet() {
  const light = $("health");
  try {
    const status = await api.health();
    light.className = `dot ${status}`;
    light.title = `The services are ${status}`;
  } catch {
    light.className = "dot unavailable";
    light.title = "The gateway can't be reached";
  }
  try {
    const [model] = await api.models();
    $("model").textContent = model.id;
    asking.family = model.family;
  } catch (error) {
    $("model").textContent = error.message;
  }
}

$("panel-one").addEventListener("submit", submit("question", (text) => { asking.one(text, options()); $("question").select(); }));
$("panel-many").addEventListener("submit", submit("questions", askMany));
$("panel-score").addEventListener("submit", submit("score-question", score));
$("questions").addEventListener("input", () => { edited = true; });
$("suggest").addEventListener("click", suggest);
$("stop").addEventListener("click", () => asking.stop());
document.addEventListener("keydown", onKey);
panel.addEventListener("ready", () => {
  clearAnswers();
  showError($("ask-error"), null);
  if (!edited) suggest();
  announce("The image is ready.");
  tabs.focusField();
});
panel.addEventListener("erased", ({ detail }) => {
  clearAnswers();
  const text = detail.complete
    ? "Erased: the file, its embedding and everything cached from it are gone."
    : "Erased here. Some processes have not confirmed yet; erasing goes on.";
  $("empty").textContent = text;
  announce(text);
  $("file").focus();
});
suggest();
greet();
panel.showSamples().catch(() => {});
