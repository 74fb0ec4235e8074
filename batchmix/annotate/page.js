// The table of rows. Data comes as JSON and goes into the page as text, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("rows").textContent);
const search = document.getElementById("search");
const filter = document.getElementById("filter");
const body = document.getElementById("table-body");
const count = document.getElementById("count");
const more = document.getElementById("more");
const PAGE = 50;
let shown = PAGE;
for (const row of data) row.haystack = Object.values(row).map((value) => String(value ?? "")).join("\n").toLowerCase();

const FILTERS = {
  all: () => true,
  errors: (row) => row.error !== null,
  wrong: (row) => row.right === false,
  unsure: (row) => row.confidence !== null && row.confidence < 0.9,
};

function cell(text, className) {
  const element = document.createElement("td");
  const inner = className.startsWith("text") ? element.appendChild(document.createElement("div")) : element;
  inner.textContent = text ?? "";
  inner.className = className;
  return element;
}

function render() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = data.filter((row) => FILTERS[filter.value](row) && words.every((word) => row.haystack.includes(word)));
  body.replaceChildren(...found.slice(0, shown).map((row) => {
    const line = document.createElement("tr");
    const confidence = row.confidence === null ? "" : row.confidence.toFixed(3);
    line.append(cell(row.id, "number"), cell(row.prompt, "text"), cell(row.answer, row.right === false ? "text bad" : "text"),
                cell(confidence, "number"), cell(row.gold, "text"), cell(row.error, "bad"));
    return line;
  }));
  count.textContent = `${found.length} of ${data.length} rows`;
  more.hidden = found.length <= shown;
}

function restart() { shown = PAGE; render(); }
search.addEventListener("input", restart);
filter.addEventListener("change", restart);
more.addEventListener("click", () => { shown += PAGE; render(); });
render();
