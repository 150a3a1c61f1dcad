"use strict";
// Names of files and classes go into the page as text alone, never as markup.
const AT_ONCE = 8;
const find = (id) => document.getElementById(id);
const [drop, files, status, foreign, results, clear] =
  ["drop", "files", "status", "foreign", "results", "clear"].map(find);
let limits = { files: AT_ONCE, file_bytes: Infinity, body_bytes: Infinity };
let waiting = Promise.resolve();

function make(tag, text, parent, className) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  if (parent) parent.append(element);
  return element;
}

function picture(source, caption, alternative, parent) {
  const figure = make("figure", "", parent);
  const image = make("img", "", figure);
  image.src = source;
  image.alt = alternative;
  make("figcaption", caption, figure);
}

function card(result) {
  const item = make("li");
  if (result.error) {
    item.className = "failed";
    make("h2", "No answer", item);
    make("p", result.error, item);
  } else {
    item.className = result.undecided ? "undecided" : "decided";
    picture(result.seen, "as the model reads it", `the cell ${result.name}`, item);
    if (result.map) picture(result.map, "where the attention looked", `attention map of ${result.name}`, item);
    const percent = `${(100 * result.probability).toFixed(1)} %`;
    make("h2", result.undecided ? `Don't know (${result.class}, ${percent})` : `${result.class}, ${percent}`, item);
    const body = make("tbody", "", make("table", "", item));
    const likeliest = Object.entries(result.probabilities).sort((a, b) => b[1] - a[1]).slice(0, 3);
    for (const [name, probability] of likeliest) {
      const row = make("tr", "", body);
      make("td", name, row);
      const meter = make("meter", "", make("td", "", row));
      meter.value = probability;
      meter.setAttribute("aria-label", `probability of ${name}`);
      make("td", `${(100 * probability).toFixed(1)} %`, row);
    }
  }
  make("p", result.name, item, "name");
  results.prepend(item);
}

let warned = "";
function warn(sentences) {
  if (sentences.join() === warned) return; // said again, a screen reader would read it again
  warned = sentences.join();
  foreign.replaceChildren();
  foreign.hidden = !sentences.length;
  if (foreign.hidden) return;
  make("p", "The last images look unlike those of training, so answers may be wrong more often:", foreign);
  const list = make("ul", "", foreign);
  for (const sentence of sentences) make("li", sentence, list);
}

function parts(chosen) {
  // Requests of a few files each, none larger than the server takes.
  const found = [];
  let size = 0;
  for (const file of chosen) {
    if (file.size > limits.file_bytes) {
      card({ name: file.name, error: `${file.size} bytes; expected at most ${limits.file_bytes}` });
      continue;
    }
    const last = found.at(-1);
    if (last && last.length < Math.min(AT_ONCE, limits.files) && size + file.size < limits.body_bytes * 0.9) {
      last.push(file);
      size += file.size;
    } else {
      found.push([file]);
      size = file.size;
    }
  }
  return found;
}

async function send(part) {
  const form = new FormData();
  for (const file of part) form.append("images", file, file.name);
  try {
    const response = await fetch("api/classify", { method: "POST", body: form });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    answer.results.forEach(card);
    warn(answer.foreign);
  } catch (error) {
    for (const file of part) card({ name: file.name, error: error.message });
  }
}

async function classify(chosen) {
  let done = 0;
  clear.hidden = false;
  for (const part of parts(chosen)) {
    status.textContent = `${done} of ${chosen.length} classified…`;
    await send(part);
    done += part.length;
  }
  status.textContent = `${chosen.length} of ${chosen.length} done`;
}

// One after another, whatever is dropped meanwhile.
const take = (list) => {
  const chosen = [...list];
  if (chosen.length) waiting = waiting.then(() => classify(chosen));
};

files.addEventListener("change", () => {
  take(files.files);
  files.value = "";
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  // Over the whole page, so that a cell dropped beside the field is not opened in place of the page.
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}
clear.addEventListener("click", () => {
  results.replaceChildren();
  warn([]);
  status.textContent = "";
  clear.hidden = true;
  files.focus();
});

fetch("api/model").then((response) => response.json()).then((model) => {
  limits = model.limits;
  const maps = model.maps ? "with attention maps" : "without attention maps";
  const calibration = model.calibration ? `calibrated by ${model.calibration}` : "not calibrated";
  find("model").textContent =
    `${model.run}: ${model.backbone}, ${model.classes.length} classes (${model.classes.join(", ")}), ${calibration}, ` +
    `${maps}; “don't know” below ${(100 * model.undecided_below).toFixed(0)} %`;
}).catch(() => {
  find("model").textContent = "The server does not answer.";
});
