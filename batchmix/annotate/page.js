// The table of rows, which is in the page already: search, filter, order, and 50 rows at a time.
"use strict";
const search = document.getElementById("search");
const filter = document.getElementById("filter");
const order = document.getElementById("order");
const body = document.querySelector("#rows tbody");
const count = document.getElementById("count");
const more = document.getElementById("more");
const PAGE = 50;
let shown = PAGE;

const data = Array.from(body.rows, (element, place) => ({
  element, place,
  row: Number(element.dataset.row),
  certainty: element.dataset.certainty === "" ? null : Number(element.dataset.certainty),
  error: "error" in element.dataset,
  disagrees: "disagrees" in element.dataset,
  haystack: element.textContent.toLowerCase(),
}));

const FILTERS = {
  all: () => true,
  errors: (row) => row.error,
  disagrees: (row) => row.disagrees,
  unsure: (row) => row.certainty !== null && row.certainty < 0.9,
};

// Rows whose certainty is not known stand last in both directions.
const byCertainty = (sign) => (a, b) =>
  a.certainty === null || b.certainty === null
    ? (a.certainty === null) - (b.certainty === null)
    : sign * (a.certainty - b.certainty);

const ORDERS = {
  first: (a, b) => a.place - b.place,
  unsure: byCertainty(1),
  sure: byCertainty(-1),
  row: (a, b) => a.row - b.row,
};

function render() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = data.filter((row) => FILTERS[filter.value](row) && words.every((word) => row.haystack.includes(word)));
  found.sort(ORDERS[order.value]);
  body.replaceChildren(...found.slice(0, shown).map((row) => row.element));
  count.textContent = `${found.length} of ${data.length} rows`;
  more.hidden = found.length <= shown;
}

function restart() { shown = PAGE; render(); }
search.addEventListener("input", restart);
filter.addEventListener("change", restart);
order.addEventListener("change", restart);
more.addEventListener("click", () => { shown += PAGE; render(); });
document.querySelector(".controls").hidden = false;
render();
