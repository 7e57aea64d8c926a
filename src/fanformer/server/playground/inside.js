// A look inside: gates, turns of the Fourier channels and their spectrum, one row a block.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 100;

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function picture(label) {
  const element = svg("svg", { viewBox: `0 0 ${WIDTH} 10`, role: "img", "aria-label": label, preserveAspectRatio: "none" });
  return element;
}

function rangeCell(range, most, digits) {
  const cell = document.createElement("td");
  if (!range) return cell;
  const [low, middle, high] = range.map((value) => (WIDTH * value) / most);
  const drawn = picture(`from ${range[0].toFixed(digits)} to ${range[2].toFixed(digits)}`);
  drawn.append(
    svg("rect", { class: "track", y: 4, width: WIDTH, height: 2 }),
    svg("rect", { class: "reach", x: low, y: 2, width: Math.max(high - low, 0.5), height: 6 }),
    svg("rect", { class: "middle", x: middle - 0.6, width: 1.2, height: 10 }),
  );
  cell.append(drawn, range[1].toFixed(digits));
  return cell;
}

function spectrumCell(spectrum) {
  const cell = document.createElement("td");
  if (!spectrum.length) return cell;
  const most = Math.max(...spectrum);
  const top = spectrum.indexOf(most);
  const frequency = ((top + 0.5) / (2 * spectrum.length)).toFixed(2);
  const drawn = picture(`strongest at ${frequency} cycles per token`);
  const width = WIDTH / spectrum.length;
  spectrum.forEach((share, i) => {
    const height = most > 0 ? (10 * share) / most : 0;
    drawn.append(svg("rect", { class: "share", x: i * width + 0.5, y: 10 - height, width: width - 1, height }));
  });
  cell.append(drawn, `peak at ${frequency}`);
  return cell;
}

export function insideTable(found) {
  const layers = found.layers;
  const most = Math.max(...layers.map((layer) => layer.turns?.[2] ?? 0), 1);
  const table = document.createElement("table");
  const caption = table.createCaption();
  caption.className = "quiet";
  caption.textContent = `${found.model}, ${found.tokens} tokens. Bars reach from a tenth to nine tenths of the channels.`;
  const heads = table.createTHead().insertRow();
  for (const name of ["block", "gate of attention, 0 to 1", "gate of the FFN, 0 to 1",
    `turn of Fourier channels, 0 to ${most.toFixed(1)} rad`, "spectrum, 0 to 0.5 cycles per token"]) {
    const head = document.createElement("th");
    head.scope = "col";
    head.textContent = name;
    heads.append(head);
  }
  const body = table.createTBody();
  layers.forEach((layer, index) => {
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = index;
    body.insertRow().append(
      head,
      rangeCell(layer.gates.attention, 1, 2),
      rangeCell(layer.gates.feed_forward, 1, 2),
      rangeCell(layer.turns, most, 2),
      spectrumCell(layer.spectrum),
    );
  });
  const wide = document.createElement("div");
  wide.className = "wide";
  wide.tabIndex = 0;
  wide.role = "region";
  wide.ariaLabel = "What the blocks do";
  wide.append(table);
  return wide;
}
