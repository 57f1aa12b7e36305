// ROC and precision-recall curves of one class against the others, and points on them.

import { element, svgElement } from "./dom.js";

const SIDE = 260;
const MARGIN = { left: 44, top: 10, right: 10, bottom: 40 };

// For each distinct score of a class, highest first: how many of its own images, and of others, reach it.
export function makeCurve(results, label) {
  const floor = results.floors?.[label] ?? -Infinity;
  const pairs = [];
  let numOwn = 0;
  let numOthers = 0;
  for (const i of results.counted()) {
    const isOwn = results.truth[i] === label;
    if (isOwn) numOwn += 1;
    else numOthers += 1;
    const score = results.score(i, label);
    if (score > floor) pairs.push([score, isOwn]);
  }
  pairs.sort((a, b) => b[0] - a[0]);
  const points = [];
  let [own, others] = [0, 0];
  pairs.forEach(([threshold, isOwn], at) => {
    if (isOwn) own += 1;
    else others += 1;
    if (at + 1 === pairs.length || pairs[at + 1][0] < threshold) points.push({ threshold, own, others });
  });
  return { points, numOwn, numOthers, isWhole: floor === -Infinity };
}

export function rates(curve, { own, others }) {
  const passed = own + others;
  const recall = own / curve.numOwn;
  const precision = passed === 0 ? 1 : own / passed;
  return { recall, precision, falsePositiveRate: others / curve.numOthers,
    f1: (2 * own) / (passed + curve.numOwn) };
}

const NOTHING = { own: 0, others: 0 };

export function rocArea(curve) {
  let [area, before] = [0, rates(curve, NOTHING)];
  for (const point of curve.points) {
    const here = rates(curve, point);
    area += ((here.recall + before.recall) / 2) * (here.falsePositiveRate - before.falsePositiveRate);
    before = here;
  }
  return area;
}

export function averagePrecision(curve) {
  let [sum, recall] = [0, 0];
  for (const point of curve.points) {
    const here = rates(curve, point);
    sum += here.precision * (here.recall - recall);
    recall = here.recall;
  }
  return sum;
}

const across = (share) => MARGIN.left + SIDE * share;
const up = (share) => MARGIN.top + SIDE * (1 - share);

function axes(xName, yName) {
  const parts = [svgElement("rect", { class: "frame", x: MARGIN.left, y: MARGIN.top, width: SIDE, height: SIDE })];
  for (const share of [0, 0.5, 1]) {
    parts.push(
      svgElement("text", { x: across(share), y: up(0) + 16, "text-anchor": "middle", text: String(share) }),
      svgElement("text", { x: MARGIN.left - 6, y: up(share) + 4, "text-anchor": "end", text: String(share) }));
  }
  parts.push(
    svgElement("text", { x: across(0.5), y: up(0) + 34, "text-anchor": "middle", text: xName }),
    svgElement("text", { transform: `translate(12 ${up(0.5)}) rotate(-90)`, "text-anchor": "middle", text: yName }));
  return parts;
}

// Points nearer to the last one than a third of a pixel would not be seen.
function pathOf(shares, isStepped) {
  let [path, lastX, lastY] = ["", -9, -9];
  shares.forEach(([x, y], at) => {
    const [px, py] = [across(x), up(y)];
    if (at < shares.length - 1 && Math.abs(px - lastX) < 0.3 && Math.abs(py - lastY) < 0.3) return;
    if (path === "") path = `M${px.toFixed(1)} ${py.toFixed(1)}`;
    else path += `${isStepped ? `V${py.toFixed(1)}` : ""}L${px.toFixed(1)} ${py.toFixed(1)}`;
    [lastX, lastY] = [px, py];
  });
  return path;
}

export class CurvePlot {
  constructor(title, xName, yName, coordinates, isStepped) {
    Object.assign(this, { title, coordinates, isStepped, xName, yName });
    this.caption = element("p", { class: "muted" });
    this.path = svgElement("path", { class: "curve" });
    this.point = svgElement("circle", { class: "point", r: "6" });
    this.node = svgElement("svg", { class: "plot", role: "img",
      viewBox: `0 0 ${MARGIN.left + SIDE + MARGIN.right} ${MARGIN.top + SIDE + MARGIN.bottom}` },
      ...axes(xName, yName), this.path, this.point);
  }

  // Undefined, a curve leaves only its summary.
  draw(curve, summary, isDefined) {
    Object.assign(this, { curve, summary, isDefined });
    this.caption.textContent = summary;
    const shown = isDefined ? [NOTHING, ...curve.points] : [];
    this.path.setAttribute("d", pathOf(shown.map((point) => this.coordinates(rates(curve, point))), this.isStepped));
    this.point.setAttribute("visibility", isDefined ? "visible" : "hidden");
    this.node.setAttribute("aria-label", `${this.title}, ${summary}`);
  }

  mark(point) {
    if (!this.isDefined) return;
    const [x, y] = this.coordinates(rates(this.curve, point));
    this.point.setAttribute("cx", across(x));
    this.point.setAttribute("cy", up(y));
    this.node.setAttribute("aria-label", `${this.title}, ${this.summary}; the point: ` +
      `${this.xName} ${x.toFixed(3)}, ${this.yName} ${y.toFixed(3)}`);
  }
}
