"""Style and script of every page: constants, so that a page needs no other file.

Colours of charts are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which colour-blind readers tell apart.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --card: #f4f6f8; --text: #1b1f24; --soft: #57606a; --line: #d4d9de; --accent: #0067a8;
  --mark: #fff3c4; --line0: #0072b2; --line1: #c26a00; --line2: #007f5c; --line3: #b0527f;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171a; --card: #1f2429; --text: #e8eaed; --soft: #a5adb6; --line: #3a4149; --accent: #6cb8f0;
    --mark: #4a3f12; --line0: #56b4e9; --line1: #e69f00; --line2: #2fbf94; --line3: #dd93bb;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--back); color: var(--text); overflow-wrap: anywhere; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 0 0 .5rem; font-size: 1.3rem; line-height: 1.3; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1.05rem; }
p { margin: .5rem 0; max-width: 48rem; white-space: pre-line; }
.soft, figcaption, footer { color: var(--soft); font-size: .9rem; }
a { color: var(--accent); }
nav { position: sticky; top: 0; z-index: 1; margin-top: 1rem; background: var(--back);
  border-bottom: 1px solid var(--line); }
nav ul { display: flex; gap: 1.1rem; max-width: 76rem; margin: 0 auto; padding: .6rem 1rem; overflow-x: auto;
  list-style: none; white-space: nowrap; font-size: .9rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { padding: 1.5rem 0; border-bottom: 1px solid var(--line); }
footer { padding: 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30%, 10.6rem), 1fr)); gap: .6rem;
  margin: .8rem 0; }
.card { padding: .6rem .8rem; border-radius: .5rem; background: var(--card); }
.card dt { color: var(--soft); font-size: .85rem; }
.card dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.card small { display: block; color: var(--soft); font-size: .75rem; line-height: 1.3; }
.scroll { max-width: 100%; max-height: 36rem; overflow: auto; border: 1px solid var(--line); border-radius: .5rem;
  margin: .6rem 0; width: fit-content; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  unicode-bidi: isolate; }
tbody tr:last-child > * { border-bottom: 0; }
td { max-width: 24rem; overflow-wrap: anywhere; min-width: 3rem; }
td:first-child { min-width: 7rem; }
td.long { min-width: 15rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--card); vertical-align: bottom; }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort] button::after { content: "\\2195" / ""; margin-left: .3em; color: var(--soft); }
th[aria-sort=ascending] button::after { content: "\\2191" / ""; color: var(--accent); }
th[aria-sort=descending] button::after { content: "\\2193" / ""; color: var(--accent); }
tr.marked td { background: var(--mark); }
label { display: block; margin: .6rem 0 .3rem; font-size: .9rem; color: var(--soft); }
input, select { font: inherit; color: var(--text); background: var(--back); border: 1px solid var(--line);
  border-radius: .4rem; padding: .3rem .5rem; max-width: 100%; }
figure { margin: .8rem 0; min-width: 0; }
figcaption { margin-top: .2rem; unicode-bidi: plaintext; white-space: pre-line; }
.zoom { all: unset; display: block; cursor: zoom-in; max-width: 100%; }
.zoom:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.zoom img { display: block; max-width: 100%; height: auto; border-radius: .4rem; background: #ffffff; }
.chart { width: 100%; max-width: 40rem; height: auto; display: block; }
.chart text { fill: var(--soft); font-size: 12px; }
.chart .axis { stroke: var(--line); fill: none; }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .line0 { stroke: var(--line0); } .chart .line1 { stroke: var(--line1); }
.chart .line2 { stroke: var(--line2); } .chart .line3 { stroke: var(--line3); }
.chart text.line0 { fill: var(--line0); stroke: none; } .chart text.line1 { fill: var(--line1); stroke: none; }
.chart text.line2 { fill: var(--line2); stroke: none; } .chart text.line3 { fill: var(--line3); stroke: none; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 0 1.5rem;
  align-items: start; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--width)), 1fr)); gap: 1rem;
  margin: .8rem 0; align-items: start; }
.grid figure { margin: 0; }
.grid .zoom img { width: 100%; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; padding: .7rem; background: var(--card); border-radius: .5rem; font-size: .85rem;
  overflow-wrap: normal; }
dialog { width: 100vw; height: 100vh; height: 100dvh; max-width: none; max-height: none; margin: 0; padding: 0;
  border: 0; background: #000000ee; color: #ffffff; }
dialog[open] { display: grid; grid-template: 1fr auto / 1fr; }
dialog img { width: 100%; height: 100%; object-fit: contain; min-height: 0; background: transparent; }
dialog .panel { display: flex; gap: .6rem; align-items: center; padding: .6rem; }
dialog .panel p { flex: 1; margin: 0; max-height: 5rem; overflow: auto; font-size: .9rem; min-width: 0; }
dialog button { font: inherit; color: #ffffff; background: #444444; border: 0; border-radius: .4rem;
  padding: .4rem .8rem; }
@media print { nav, label, dialog { display: none; } .scroll { max-height: none; } section { break-inside: avoid; } }
"""

SCRIPT = """
'use strict';
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// Tables: a click on a column's name sorts, numbers largest first; cells without a value stay last.
for (const table of all('table.sortable')) {
  const headers = all('thead th', table);
  headers.forEach((header, column) => header.querySelector('button').addEventListener('click', () => {
    const isNumber = header.classList.contains('number');
    const before = header.getAttribute('aria-sort');
    const order = before === 'none' ? (isNumber ? 'descending' : 'ascending')
      : before === 'ascending' ? 'descending' : 'ascending';
    headers.forEach(h => h.setAttribute('aria-sort', 'none'));
    header.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    const rows = all('tbody tr', table).map(row => {
      const cell = row.cells[column];
      return {row, value: isNumber ? (cell.dataset.value ? Number(cell.dataset.value) : null) : cell.textContent};
    });
    rows.sort((a, b) => (a.value === null) - (b.value === null)
      || sign * (isNumber ? a.value - b.value : a.value.localeCompare(b.value, undefined, {numeric: true})));
    table.tBodies[0].append(...rows.map(r => r.row));
  }));
}

// The field above a table leaves only the rows that contain what is typed.
for (const field of all('input.filter')) {
  const rows = all('tbody tr', field.closest('.filtered'));
  field.addEventListener('input', () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

// A list of names shows one of several pieces.
for (const list of all('select.choice')) {
  const pieces = all(':scope > .piece', list.closest('.choices'));
  const show = () => pieces.forEach((piece, i) => { piece.hidden = i !== list.selectedIndex; });
  list.addEventListener('change', show);
  show(); // a browser that goes back keeps what was selected
}

// Pictures: a click enlarges, arrow keys go on to the next of the section, Escape closes.
const box = document.querySelector('dialog');
let shown = [], place = 0;
const show = index => {
  place = (index + shown.length) % shown.length;
  const picture = shown[place].querySelector('img');
  box.querySelector('img').src = picture.src;
  box.querySelector('img').alt = picture.alt;
  const caption = shown[place].closest('figure')?.querySelector('figcaption');
  box.querySelector('p').textContent = `${place + 1} / ${shown.length}  ${caption ? caption.textContent : picture.alt}`;
};
for (const button of all('.zoom')) button.addEventListener('click', () => {
  shown = all('.zoom', button.closest('section')).filter(b => b.offsetParent !== null);
  show(shown.indexOf(button));
  box.showModal();
});
box.addEventListener('click', event => {
  const step = event.target.dataset.step;
  if (step) show(place + Number(step)); else if (!event.target.closest('p')) box.close();
});
box.addEventListener('keydown', event => {
  if (event.key === 'ArrowRight') show(place + 1);
  if (event.key === 'ArrowLeft') show(place - 1);
});
"""
