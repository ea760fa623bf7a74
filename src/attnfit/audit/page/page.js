"use strict";
// The view is kept in the address, so that a link shows what its sender saw:
// #show&filter=TABLE:WORDS&sort=TABLE:COLUMN:descending
const view = new URLSearchParams(location.hash.slice(1));

function remember(name, value) {
  if (value === null) view.delete(name); else view.set(name, value);
  const hash = view.toString();
  try { history.replaceState(null, "", hash ? "#" + hash : location.pathname); } catch { /* The view works without. */ }
}

function key(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
}

function compare(a, b, sign) {
  if (typeof a === "number" && typeof b === "number") {
    // Unknown numbers come last, whichever way the others go.
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return sign * (a - b);
  }
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(table, column, order) {
  const rows = [...table.tBodies[0].rows];
  const sign = order === "descending" ? -1 : 1;
  rows.sort((x, y) => compare(key(x, column), key(y, column), sign));
  table.tBodies[0].append(...rows);
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", order); else head.removeAttribute("aria-sort");
  });
  remember("sort", `${table.id}:${column}:${order}`);
}

function filter(table, words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !wanted.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  const count = document.getElementById(table.id + "-count");
  if (count) count.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
  remember("filter", words ? `${table.id}:${words}` : null);
}

for (const head of document.querySelectorAll("table.sortable th")) {
  head.querySelector("button").addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
    sort(head.closest("table"), head.cellIndex, order);
  });
}
for (const box of document.querySelectorAll("input[data-table]")) {
  box.addEventListener("input", () => filter(document.getElementById(box.dataset.table), box.value));
}
const toggle = document.getElementById("show");
if (toggle) {
  const apply = () => {
    document.body.classList.toggle("redacted", !toggle.checked);
    remember("show", toggle.checked ? "" : null);
  };
  toggle.checked = view.has("show");
  toggle.addEventListener("change", apply);
  apply();
}
const [filtered, ...words] = (view.get("filter") || "").split(":");
const box = filtered && document.querySelector(`input[data-table="${CSS.escape(filtered)}"]`);
if (box) {
  box.value = words.join(":");
  box.dispatchEvent(new Event("input"));
}
const [sorted, column, order] = (view.get("sort") || "").split(":");
const table = sorted && document.getElementById(sorted);
if (table && table.tHead.rows[0].cells[Number(column)]) sort(table, Number(column), order === "ascending" ? order : "descending");
