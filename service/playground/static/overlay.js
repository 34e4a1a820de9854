/** Which tokens stayed, drawn over the picture or frame that they were chosen from. */

const SVG = "http://www.w3.org/2000/svg";
const KINDS = ["salient", "diverse", "kept"];
let count = 0;

/**
 * An SVG to lie over a picture of `width` x `height`: dropped patches dimmed, kept ones outlined by kind.
 *
 * parts: the token map's entries of this one picture or frame; crops may overlap. Null where nothing was pruned.
 */
export function overlay(parts, width, height) {
  const pruned = parts.some((part) => KINDS.reduce((sum, kind) => sum + (part[kind]?.length ?? 0), 0) < cells(part));
  if (!pruned) return null;
  const svg = element("svg", { class: "overlay", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  svg.setAttribute("aria-hidden", "true"); // the counts stand in the legend
  const paths = Object.fromEntries(KINDS.map((kind) => [kind, parts.map((part) => path(part, kind)).join("")]));
  const mask = element("mask", { id: `kept-${(count += 1)}` });
  const whole = parts.map((part) => rectangle(part.box)).join("");
  mask.append(element("path", { d: whole, fill: "white" }));
  mask.append(element("path", { d: Object.values(paths).join(""), fill: "black" }));
  svg.append(mask, element("path", { class: "dropped", d: whole, mask: `url(#${mask.id})` }));
  for (const kind of KINDS.filter((each) => paths[each])) {
    svg.append(element("path", { class: "casing", d: paths[kind] }));
    svg.append(element("path", { class: kind, d: paths[kind] }));
  }
  return svg;
}

function cells(part) {
  return part.grid[0] * part.grid[1];
}

function path(part, kind) {
  const [rows, columns] = part.grid;
  const [left, top, right, bottom] = part.box;
  const [across, down] = [(right - left) / columns, (bottom - top) / rows];
  return (part[kind] ?? [])
    .map((index) => {
      const [x, y] = [left + (index % columns) * across, top + Math.floor(index / columns) * down];
      return rectangle([x, y, x + across, y + down]);
    })
    .join("");
}

function rectangle([left, top, right, bottom]) {
  return `M${left} ${top}H${right}V${bottom}H${left}Z`;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
