const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const specs = JSON.parse(document.getElementById("charts").textContent);

function theme() {
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map(color);
  const words = { labelColor: soft, titleColor: soft, labelFontSize: 11, titleFontSize: 11 };
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { ...words, titleFontWeight: "normal", gridColor: line, domainColor: line, tickColor: line },
    legend: { ...words, symbolStrokeWidth: 0 },
    header: { labelColor: ink },
    text: { color: ink },
  };
}

// Small multiples get as many columns as fit; Vega fits the other charts itself.
function fitted(spec, width) {
  if (!spec.facet) return spec;
  const panels = new Set(spec.data.values.map((value) => value[spec.facet.field])).size;
  const columns = Math.max(1, Math.min(5, panels, Math.floor(width / 190)));
  const panel = Math.max(90, Math.floor(width / columns) - 62);
  return { ...spec, columns, spec: { ...spec.spec, width: panel } };
}

async function draw(element) {
  const spec = specs[element.dataset.chart];
  const options = { actions: false, renderer: "svg", config: theme() };
  element.drawn?.finalize();
  element.drawn = await vegaEmbed(element, fitted(spec, element.clientWidth), options);
  element.dataset.width = element.clientWidth;
}

function drawAll(within, again) {
  for (const element of within.querySelectorAll(".chart")) {
    const closed = element.closest("details:not([open])");
    if (!closed && element.isConnected && (again || !element.drawn)) draw(element);
  }
}

function follow() {
  root.classList.toggle("dark", dark.matches);
  drawAll(document, true);
}

for (const group of document.querySelectorAll("details.group")) {
  group.addEventListener("toggle", () => drawAll(group, false));
}
dark.addEventListener("change", follow);
addEventListener("resize", () => {
  clearTimeout(follow.timer);
  follow.timer = setTimeout(() => {
    for (const element of document.querySelectorAll(".chart[data-width]")) {
      const { facet } = specs[element.dataset.chart];
      if (facet && +element.dataset.width !== element.clientWidth) draw(element);
    }
  }, 200);
});
follow();

const table = document.getElementById("leaderboard");
if (table) {
  const text = document.getElementById("datatables").textContent;
  const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  const { jQuery } = await import(url);
  URL.revokeObjectURL(url);
  const filters = document.getElementById("filters").elements;
  const data = jQuery(table).DataTable({
    paging: false,
    order: [],
    columnDefs: [
      { orderable: false, searchable: false, targets: 0 },
      // On a telephone the accuracies come first; a row's details say data set and threat.
      // innerWidth may still be that of a page zoomed out, before the first layout.
      { visible: !matchMedia("(max-width: 600px)").matches, targets: [2, 3] },
    ],
    layout: {
      topStart: { buttons: [{ extend: "colvis", text: "Columns", columns: ":gt(1)" }] },
      topEnd: "search",
      bottomStart: "info",
      bottomEnd: null,
    },
    language: { search: "Search", emptyTable: "No records yet.", zeroRecords: "No row fits." },
  });
  data.search.fixed("filters", (_text, _data, index) => {
    const { className, dataset } = data.row(index).node();
    const protocols = JSON.parse(dataset.protocol ?? "[]");
    return (
      (!className.includes("other") || filters.others?.checked) &&
      (!filters.dataset.value || dataset.dataset === filters.dataset.value) &&
      (!filters.threat.value || dataset.threat === filters.threat.value) &&
      (!filters.protocol.value || protocols.includes(filters.protocol.value))
    );
  });
  data.draw();
  document.getElementById("filters").addEventListener("input", () => data.draw());

  const box = table.parentElement;
  new ResizeObserver(() => root.style.setProperty("--box", `${box.clientWidth}px`)).observe(box);
  table.addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (!button) return;
    const row = data.row(button.closest("tr"));
    const opens = !row.child.isShown();
    if (opens) {
      const content = document.createElement("div");
      content.append(document.getElementById(button.dataset.detail).content.cloneNode(true));
      row.child(content, "detail").show();
      drawAll(content, false);
    } else {
      row.child.hide();
    }
    button.setAttribute("aria-expanded", opens);
  });
}
root.dataset.ready = "true";
