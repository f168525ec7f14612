// What the page does by itself: nothing here asks the server.

// The language lets a screen reader choose its voice.
document.documentElement.lang = "en";

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-un-copy]");
  if (!button) return;
  const code = button.parentElement.querySelector("code");
  const said = (text) => { button.textContent = text; };
  const mark = () => {  // without the right to the clipboard the text is marked, ready to copy
    getSelection().selectAllChildren(code);
    said("Marked: press Ctrl+C");
  };
  if (!navigator.clipboard) mark();
  else navigator.clipboard.writeText(code.textContent).then(() => said("Copied"), mark);
});

// Esc stops the answer that is being written, wherever the focus is; Enter is the form's own.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const stop = document.querySelector("#un-stop");
  if (stop && !stop.disabled) stop.click();
});

// A question is taken before the server has heard of it. On a phone the answer is above the
// button: it is brought into view.
const ASKS = [
  ["#un-ask, #un-examples button", "#un-status p"],
  ["#un-fill", "#un-sheet-status p"],
  ["#un-stack input, #un-clear", "#un-status p[data-question]:not([data-question=''])"],
];
const BUSY = /^(Answering|Waiting|Scoring)/;
function asking(status) {
  if (!status || BUSY.test(status.textContent)) return;
  status.textContent = "Asking …";
  if (status.getBoundingClientRect().top < 0) status.scrollIntoView({ block: "start" });
}
document.addEventListener("click", (event) => {
  for (const [asked, status] of ASKS) {
    if (event.target.closest(asked)) asking(document.querySelector(status));
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && event.target.closest("#un-question")) {
    asking(document.querySelector("#un-status p"));
  }
});

// So is a stop: the model ends the step that it is in before the server can say so.
const UNDER_WAY = /^(?:Asking|Answering|Waiting|Scoring|(\d+) of (?!\1 ))(?!.*Stopped)/;
document.addEventListener("click", (event) => {
  if (!event.target.closest("#un-stop, #un-sheet-stop")) return;
  for (const status of document.querySelectorAll("#un-status p, #un-sheet-status p")) {
    if (UNDER_WAY.test(status.textContent)) status.textContent = "Stopping …";
  }
});

// Columns of the tables are as wide as the reader pulls them: by the edge of a heading, or by
// Alt with an arrow key on it. gradio sets widths in line, so rules in a style sheet overrule them.
const TABLES = "#un-sheet, #un-runs, #un-logs";
const NARROWEST = 48, EDGE = 8;  // pixels
const rules = document.head.appendChild(document.createElement("style"));
const widths = {};  // by the table's id and the column's number
function setWidth(heading, width) {
  const table = heading.closest(TABLES);
  const columns = widths[table.id] ??= {};
  const headings = [...table.querySelectorAll("th[role=columnheader]")];
  for (const each of headings) {
    columns[each.ariaColIndex] ??= Math.ceil(each.getBoundingClientRect().width);
  }
  columns[heading.ariaColIndex] = Math.max(NARROWEST, Math.round(width));
  rules.textContent = Object.entries(widths).map(([id, found]) => {
    const total = Object.values(found).reduce((sum, each) => sum + each, 0);
    const each = Object.entries(found).map(([column, pixels]) =>
      `#${id} th[aria-colindex="${column}"], #${id} [role=gridcell][aria-colindex="${column}"] {`
      + `width:${pixels}px !important; min-width:${pixels}px !important;`
      + `max-width:${pixels}px !important; flex:0 0 ${pixels}px !important; }`);
    return `#${id} :is(.header-table, .virtual-body) { width:${total}px !important; }`
      + each.join("");
  }).join("");
}
function headingAt(event) {
  return event.target.closest?.(`:is(${TABLES}) th[role=columnheader]`);
}
function atEdge(heading, event) {
  return heading.getBoundingClientRect().right - event.clientX <= EDGE;
}
document.addEventListener("pointerdown", (event) => {
  const heading = headingAt(event);
  if (!heading || !atEdge(heading, event)) return;
  event.preventDefault();
  event.stopPropagation();
  const start = event.clientX - heading.offsetWidth;
  const move = (moved) => setWidth(heading, moved.clientX - start);
  document.documentElement.classList.add("un-resizing");
  document.addEventListener("pointermove", move);
  document.addEventListener("pointerup", () => {
    document.removeEventListener("pointermove", move);
    document.documentElement.classList.remove("un-resizing");
  }, { once: true });
}, true);

// A heading sorts by its column: up, then down. gradio has that in the menu of the heading only,
// whose items are: ascending, descending, clear.
const frame = () => new Promise(requestAnimationFrame);
async function choose(heading, place) {
  await frame();  // the click that asked for this would close the menu
  heading.querySelector(".cell-menu-button").click();
  await frame();
  const item = document.querySelectorAll(".cell-menu [role=menuitem]")[place];
  item?.click();
  await frame();
  return Boolean(item);
}
async function sort(heading) {
  const table = heading.closest(TABLES);
  const down = heading.ariaSort === "ascending";
  for (const each of table.querySelectorAll("th[aria-sort]")) {
    await choose(each, 2);
    each.ariaSort = null;
  }
  if (await choose(heading, down ? 1 : 0)) heading.ariaSort = down ? "descending" : "ascending";
}
document.addEventListener("click", (event) => {
  const heading = headingAt(event);
  if (!heading || event.target.closest("button")) return;
  if (atEdge(heading, event)) event.stopPropagation();  // the end of a pull
  else sort(heading);
}, true);
document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -16, ArrowRight: 16 }[event.key];
  const heading = headingAt(event);
  if (!heading || !(event.key === "Enter" || (step && event.altKey))) return;
  event.preventDefault();
  event.stopPropagation();
  if (event.key === "Enter") sort(heading);
  else setWidth(heading, heading.offsetWidth + step);
}, true);
