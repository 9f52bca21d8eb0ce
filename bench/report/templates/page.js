"use strict";
// Figures are unpacked and drawn when they come near the view, so that the page is there at once.
const plots = [...document.querySelectorAll(".plot")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const themed = () => document.documentElement.dataset.theme;
const isDark = () => (themed() ? themed() === "dark" : dark.matches);
const colours = (night) => {
  const [ink, grid, card] = night ? ["#e4e8ee", "#2b313b", "#222832"] : ["#1d2228", "#e6e9ee", "#ffffff"];
  return {
    "font.color": ink, "xaxis.gridcolor": grid, "yaxis.gridcolor": grid,
    "hoverlabel.bgcolor": card, "hoverlabel.font.color": ink, "hoverlabel.bordercolor": grid,
  };
};
const paintOne = (plot, night) => {
  const wanted = colours(night);
  Plotly.relayout(plot, wanted);
  if (plot.data[0]?.error_x) Plotly.restyle(plot, { "error_x.color": wanted["font.color"] }, [0]);
};
const drawn = () => plots.filter((plot) => plot.data);
const paint = (night) => drawn().forEach((plot) => paintOne(plot, night));

const unpack = async (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
};
let unpacked = null;
const ready = () => (unpacked ??= (async () => {
  const element = document.createElement("script");
  element.textContent = await unpack("plotly");
  document.head.append(element);
  return JSON.parse(await unpack("figures"));
})());
const draw = async (plot) => {
  if (plot.dataset.state) return;
  plot.dataset.state = "drawing";
  const { data, layout } = (await ready())[plot.id];
  layout.font.family = getComputedStyle(document.body).fontFamily;
  await Plotly.newPlot(plot, data, layout, { responsive: true, displayModeBar: false, displaylogo: false });
  paintOne(plot, isDark());
  for (const button of plot.parentElement.querySelectorAll(".legend button")) show(button);
  plot.dataset.state = "drawn";
};
const show = (button) => {
  const plot = button.closest("figure").querySelector(".plot");
  if (!plot.data) return;
  const traces = plot.data.flatMap((trace, place) => (trace.meta === button.dataset.key ? [place] : []));
  if (traces.length) Plotly.restyle(plot, { visible: button.getAttribute("aria-pressed") === "true" }, traces);
};
const seen = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => { seen.unobserve(entry.target); draw(entry.target); }),
  { rootMargin: "600px" },
);
plots.forEach((plot) => seen.observe(plot));

// A legend's button shows or hides a variant; with Shift, that one alone.
document.addEventListener("click", (event) => {
  const button = event.target.closest(".legend button");
  if (!button) return;
  const all = [...button.closest(".legend").querySelectorAll("button")];
  const changed = event.shiftKey ? all : [button];
  const on = button.getAttribute("aria-pressed") === "true";
  for (const other of changed) other.setAttribute("aria-pressed", event.shiftKey ? String(other === button) : String(!on));
  changed.forEach(show);
});

dark.addEventListener("change", () => paint(isDark()));
const theme = document.getElementById("theme");
theme?.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  paint(isDark());
});

// Plotly does not hear of the width of paper, and what is folded would be missing there.
const fit = (size) => drawn().forEach((plot) => Plotly.relayout(plot, size));
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((element) => { element.open = true; });
  paint(false);
  fit({ width: 640 });
});
addEventListener("afterprint", () => {
  opened.forEach((element) => { element.open = false; });
  paint(isDark());
  fit({ width: null, autosize: true });
});

// On a narrow screen only the first figures are open; a link opens what it leads to.
if (innerWidth < 700) {
  for (const part of [...document.querySelectorAll("details.part[open]")].slice(1)) part.open = false;
}
const reveal = () => {
  const part = document.getElementById(location.hash.slice(1))?.querySelector("details.part");
  if (part) part.open = true;
};
addEventListener("hashchange", reveal);
reveal();

// The filter leaves the rows that have every word of it; the switch shows what cannot run here.
const filter = document.getElementById("filter"), count = document.getElementById("count");
const rows = [...document.querySelectorAll("table.rows tbody tr")];
const texts = new Map();
const narrow = () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let left = 0;
  for (const row of rows) {
    if (!texts.has(row)) texts.set(row, `${row.closest("[data-title]")?.dataset.title ?? ""} ${row.textContent}`.toLowerCase());
    const fits = words.every((word) => texts.get(row).includes(word));
    row.classList.toggle("filtered", !fits);
    left += fits;
  }
  count.textContent = words.length ? `${left} of ${rows.length} rows` : "";
};
filter?.addEventListener("input", narrow);
document.getElementById("all")?.addEventListener("change", (event) => document.body.classList.toggle("all", event.target.checked));

// A click on a heading sorts its table; empty cells stay last in both directions.
for (const heading of document.querySelectorAll("th")) {
  const button = document.createElement("button");
  button.textContent = heading.textContent;
  heading.replaceChildren(button);
  button.addEventListener("click", () => {
    const table = heading.closest("table"), column = heading.cellIndex;
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = (row) => {
      const cell = row.cells[column];
      // A row that did not run has one cell for all its figures.
      if (!cell || cell.colSpan > 1) return "";
      return "order" in cell.dataset ? Number(cell.dataset.order) : cell.textContent.trim();
    };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      // So do words among figures.
      if (typeof x !== typeof y) return (typeof x === "string") - (typeof y === "string");
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  });
}
