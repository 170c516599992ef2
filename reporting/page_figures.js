"use strict";
// Traces and layouts of the page's figures, from its data and from what is switched on.

const FLATNESS = "flatness/average/test";
const LOSS = "test/robust_loss";
const PUBLISHED = ", published (CIFAR-10)";
const DARK = { "#000000": "#E4E7EC", "#0072B2": "#5B8FF9", "#009E73": "#2BC59A", "#666666": "#A0A7B4" };

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const isNarrow = () => innerWidth < 700;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (method) => (isDark() && DARK[method.colour]) || method.colour;
// Plotly reads some tags in its texts; names are text alone.
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const faded = (colour, alpha) =>
  colour + Math.round(255 * alpha).toString(16).padStart(2, "0");

const format = (value, unit) => value.toFixed(unit === "%" ? 1 : Math.abs(value) >= 100 ? 0 : 2);

function axisOf(name, names) {
  const { label, unit } = names[name];
  return label + (unit && ` in ${unit}`);
}

function axis(text, more = {}) {
  return {
    title: { text, standoff: 10 }, gridcolor: css("--line"), linecolor: css("--line"),
    zeroline: false, automargin: true, fixedrange: isNarrow(), ...more,
  };
}

function layout(x, y, more = {}) {
  const font = { family: css("--font"), size: isNarrow() ? 12 : 13, color: css("--text") };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font,
    margin: { l: 52, r: 14, t: 14, b: 46 }, hovermode: "closest", showlegend: false,
    dragmode: isNarrow() ? false : "zoom", xaxis: axis(x), yaxis: axis(y),
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--text") },
    hoverlabel: { align: "left", bgcolor: css("--card"), bordercolor: css("--muted"), font },
    ...more,
  };
}

function legend(more = {}) {
  return { orientation: "h", x: 0, y: -0.22, yanchor: "top", font: { size: isNarrow() ? 11 : 12 }, ...more };
}

const dotted = (colour, dash = "dot") => ({ color: colour, width: 1.2, dash });

function verticalLine(x, colour, dash) {
  return { type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: dotted(colour, dash) };
}

// The least-squares line through points, between their ends; nothing for fewer than three.
function trend(points) {
  if (points.length < 3) return null;
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const mx = mean(points.map((p) => p.x)), my = mean(points.map((p) => p.y));
  const variance = mean(points.map((p) => (p.x - mx) ** 2));
  if (variance === 0) return null;
  const slope = mean(points.map((p) => (p.x - mx) * (p.y - my))) / variance;
  const ends = [Math.min(...points.map((p) => p.x)), Math.max(...points.map((p) => p.x))];
  return { x: ends, y: ends.map((x) => my + slope * (x - mx)) };
}

function lineTrace(line, colour, dash = "dot") {
  return {
    x: line.x, y: line.y, mode: "lines", hoverinfo: "skip", line: dotted(colour, dash), name: "",
  };
}

function pointsOf(models, x, y, weights) {
  return models.flatMap((model) => {
    const [a, b] = [model.figures[weights][x], model.figures[weights][y]];
    return a && b ? [{ model, x: a[0], y: b[0], dx: a[1] ?? 0, dy: b[1] ?? 0 }] : [];
  });
}

function hover(model, names, shown, weights) {
  const lines = [`<b>${plain(model.label)}</b>`, ...model.about.map(plain)];
  const measured = [...new Set([...shown, LOSS, "test/robust_error", "test/autoattack_error", FLATNESS])];
  for (const name of measured.filter((name) => model.figures[weights][name])) {
    const [mean, deviation] = model.figures[weights][name];
    const { label, unit } = names[name];
    const spread = deviation === undefined ? "" : ` ± ${format(deviation, unit)}`;
    lines.push(`${label}: ${format(mean, unit)}${spread}${unit && ` ${unit}`}`);
  }
  return lines.join("<br>");
}

// Models of one method share a colour; the second and later ones have other strokes.
const DASHES = ["solid", "dash", "dashdot", "longdash", "longdashdot"];
const MARKS = ["", "circle", "square", "diamond", "cross", "x"];
const modelOf = (state, label) => state.data.models.find((model) => model.label === label);
const rankOf = (state, label) => modelOf(state, label)?.rank ?? 0;
const dashOf = (state, label) => DASHES[rankOf(state, label) % DASHES.length];

// Models as points, a trace for each method and source.
function scatterTraces(state, x, y, weights) {
  const { names } = state.data;
  return state.sources().flatMap(({ models, published }) =>
    state.byMethod(models).map(([method, own]) => {
      const points = pointsOf(own, x, y, weights);
      const colour = colourOf(method);
      const bar = (key) => ({
        type: "data", array: points.map((p) => p[key]), visible: points.some((p) => p[key] > 0),
        color: faded(colour, 0.35), thickness: 1, width: 0,
      });
      return {
        x: points.map((p) => p.x), y: points.map((p) => p.y), mode: "markers",
        name: plain(method.label) + (published ? PUBLISHED : ""), meta: published ? "published" : "run",
        text: points.map((p) => hover(p.model, names, [x, y], weights)),
        hovertemplate: "%{text}<extra></extra>", error_x: bar("dx"), error_y: bar("dy"),
        marker: {
          symbol: method.symbol + (published ? "-open" : ""), size: published ? 7 : 11,
          color: colour, opacity: published ? 0.5 : 0.95,
          line: { width: published ? 1.2 : 1, color: published ? colour : css("--card") },
        },
      };
    }).filter((trace) => trace.x.length));
}

function scatterFigure(state, x, y, weights) {
  const { names } = state.data;
  return [scatterTraces(state, x, y, weights), layout(axisOf(x, names), axisOf(y, names))];
}

// The other relations between figures; each adds something to the points.
function viewFigure(state, view) {
  const [traces, shape] = scatterFigure(state, view.x, view.y, "final");
  const extra = { arrows, kink, trend: trends, diagonal }[view.kind];
  if (extra) extra(state, view, traces, shape);
  return [traces, shape];
}

function arrows(state, { x, y }, traces, shape) {
  shape.annotations = [];
  for (const { models, published } of state.sources()) {
    for (const last of pointsOf(models, x, y, "final")) {
      const [stopped] = pointsOf([last.model], x, y, "early_stopped");
      if (!stopped) continue;
      const colour = faded(colourOf(state.method(last.model.method)), published ? 0.35 : 0.75);
      shape.annotations.push({
        x: stopped.x, y: stopped.y, ax: last.x, ay: last.y, text: "", showarrow: true,
        xref: "x", yref: "y", axref: "x", ayref: "y", arrowhead: 2, arrowsize: 1,
        arrowwidth: published ? 1 : 1.5, arrowcolor: colour, standoff: 2,
      });
      // Arrows do not count for the ranges of the axes and have no hover; points at their heads do.
      traces.push({
        x: [stopped.x], y: [stopped.y], mode: "markers", hovertemplate: "%{text}<extra></extra>",
        text: [hover(last.model, state.data.names, [x, y], "early_stopped") + "<br>early-stopped"],
        marker: { size: 9, color: colour, opacity: 0 }, name: plain(last.model.label), meta: "early-stopped",
      });
    }
  }
}

function kink(state, { x, y }, traces, shape) {
  shape.shapes = state.data.guessing.map((loss) => verticalLine(loss, css("--muted"), "dash"));
  shape.annotations = state.data.guessing.map((loss) => ({
    x: loss, y: 1, yref: "paper", yanchor: "top", xanchor: "left", showarrow: false,
    text: ` guessing (${loss.toFixed(2)})`, font: { color: css("--muted"), size: 12 },
  }));
  const edge = state.data.guessing[0];
  if (edge === undefined) return;
  const points = pointsOf(state.visible(state.data.models), x, y, "final");
  for (const side of [points.filter((p) => p.x < edge), points.filter((p) => p.x >= edge)]) {
    const line = trend(side);
    if (line) traces.push(lineTrace(line, css("--text")));
  }
}

function trends(state, { x, y }, traces) {
  for (const { models } of state.sources()) {
    for (const [method, own] of state.byMethod(models)) {
      // Published models, which have no settings to compare, are a sweep where they are of one method.
      for (const sweep of new Set(own.map((model) => model.sweep))) {
        if (sweep === null) continue;
        const line = trend(pointsOf(own.filter((model) => model.sweep === sweep), x, y, "final"));
        if (line) traces.push(lineTrace(line, colourOf(method)));
      }
    }
  }
}

function diagonal(state, view, traces) {
  const values = traces.flatMap((trace) => [...trace.x, ...trace.y]);
  const ends = [Math.min(...values), Math.max(...values)];
  traces.push(lineTrace({ x: ends, y: ends }, css("--muted")));
}

// Each method's way through the plane up to a share of training, a large marker at its end.
function trajectoryFigure(state, progress) {
  const paths = state.paths();
  const traces = paths.map((path) => {
    const method = state.method(path.method);
    const colour = colourOf(method);
    const shown = path.progress.filter((share) => share <= progress + 1e-9).length;
    const last = shown - 1;
    return {
      x: path.x.slice(0, shown), y: path.y.slice(0, shown), mode: "lines+markers",
      name: plain(path.label) + (path.published ? PUBLISHED : ""), meta: path.published ? "published" : "run",
      opacity: path.published ? 0.5 : 1,
      line: { color: faded(colour, paths.length > 8 ? 0.3 : 0.6), width: 1.3, dash: path.published ? "dot" : dashOf(state, path.label) },
      marker: {
        symbol: method.symbol + (path.published ? "-open" : ""), color: colour, opacity: 1,
        size: path.x.slice(0, shown).map((_, i) => (i === last ? 12 : 3)),
        line: { width: path.published ? 1 : 0.7, color: path.published ? colour : css("--card") },
      },
      text: path.progress.slice(0, shown).map((share) =>
        `<b>${plain(path.label)}</b>${path.published ? PUBLISHED : ""}<br>` +
        `${Math.round(100 * share)} % of training`),
      hovertemplate:
        "%{text}<br>average-case flatness: %{x:.2f}<br>RLoss on test images: %{y:.2f}<extra></extra>",
    };
  });
  const { names } = state.data;
  const shape = layout(axisOf(FLATNESS, names), axisOf(LOSS, names));
  // Ranges of the whole training, so that points move and axes do not.
  if (paths.length) {
    shape.xaxis.range = rangeOf(paths, "x");
    shape.yaxis.range = rangeOf(paths, "y");
  }
  return [traces, shape];
}

// Holds all but the 4 % farthest values, which untrained networks have, and every last one.
function rangeOf(paths, key) {
  const values = paths.flatMap((path) => path[key]).sort((a, b) => a - b);
  const at = (share) => values[Math.round(share * (values.length - 1))];
  const ends = paths.map((path) => path[key][path[key].length - 1]);
  const [low, high] = [Math.min(at(0.02), ...ends), Math.max(at(0.98), ...ends)];
  const room = 0.08 * (high - low || 1);
  return [low - room, high + room];
}

// Curves over epochs of some models: lines tell what, colours whose.
function curveFigure(state, models, panel) {
  const kinds = state.data.curve_kinds.filter((kind) =>
    kind.panel === panel && models.some((model) => model.curves[kind.name]));
  const traces = kinds.map((kind) => ({
    x: [null], y: [null], mode: "lines", name: kind.label, legendgroup: kind.name,
    line: { color: css("--text"), dash: kind.dash, width: kind.width },
  }));
  for (const kind of kinds) {
    for (const model of models.filter((model) => model.curves[kind.name])) {
      const { epoch, value } = model.curves[kind.name];
      const unit = panel === "RErr" ? " %" : "";
      const mark = MARKS[model.rank % MARKS.length];
      traces.push({
        x: epoch, y: value, mode: mark ? "lines+markers" : "lines", legendgroup: kind.name, showlegend: false,
        marker: { symbol: mark || "circle", size: 7, maxdisplayed: 6 },
        name: plain(model.label), meta: "run",
        line: { color: colourOf(state.method(model.method)), dash: kind.dash, width: kind.width },
        hovertemplate:
          `<b>${plain(model.label)}</b><br>${kind.label}: %{y:.2f}${unit}<br>epoch %{x}<extra></extra>`,
      });
    }
  }
  const shapes = models.flatMap((model) => model.stopped.map((epoch) =>
    verticalLine(epoch, colourOf(state.method(model.method)), "dashdot")));
  if (panel === "RLoss") {
    shapes.push(...state.data.guessing.map((loss) => ({
      type: "line", x0: 0, x1: 1, xref: "paper", y0: loss, y1: loss, line: dotted(css("--muted")),
    })));
  }
  return [traces, layout("epoch", panel + (panel === "RErr" ? " in %" : ""), {
    showlegend: true, legend: legend(), shapes, uirevision: "curves",
    yaxis: axis(panel + (panel === "RErr" ? " in %" : ""), { rangemode: "tozero" }),
  })];
}

function landscapeFigure(state, name, label) {
  const drawn = state.visible(state.data.landscapes[name] ?? []);
  if (name.endsWith("surface")) {
    return surfaceFigure(drawn.find((one) => one.label === label) ?? drawn[0]);
  }
  const cut = (values) => values.map((value) => Math.max(value, 1e-3));
  const traces = drawn.flatMap((one) => {
    const colour = colourOf(state.method(one.method));
    const shared = { mode: "lines", x: one.step, legendgroup: one.label };
    const edge = { ...shared, hoverinfo: "skip", showlegend: false, line: { width: 0, color: colour } };
    return [
      { ...edge, y: cut(one.low) },
      { ...edge, y: cut(one.high), fill: "tonexty", fillcolor: faded(colour, 0.12) },
      {
        ...shared, y: cut(one.line), name: plain(one.label + errorOf(state, one, name)), meta: "run",
        line: { color: colour, width: 2, dash: dashOf(state, one.label) },
        hovertemplate:
          `<b>${plain(one.label)}</b><br>step %{x:.2f}: RLoss %{y:.3g}<extra></extra>`,
      },
    ];
  });
  const values = drawn.flatMap((one) => cut([...one.line, ...one.low]));
  const highest = Math.min(15, 1.1 * Math.max(...drawn.flatMap((one) => one.high)));
  const range = values.length && Math.min(...values) < highest
    ? { range: [Math.log10(Math.min(...values) / 1.1), Math.log10(highest)] } : {};
  const ticks = { type: "log", tickvals: [0.001, 0.01, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 7, 10, 15] };
  return [traces, layout("step along the direction", "RLoss", {
    showlegend: drawn.length > 1, legend: legend(),
    yaxis: axis("RLoss (logarithmic)", { ...ticks, ...range }),
  })];
}

// RErr stands beside the landscape of the same weights, as in the paper.
function errorOf(state, { label }, name) {
  const figures = modelOf(state, label).figures[name.startsWith("early_stopped") ? "early_stopped" : "final"];
  const [error] = figures["test/autoattack_error"] ?? figures["test/robust_error"] ?? [];
  return error === undefined ? "" : `, RErr ${format(error, "%")} %`;
}

function surfaceFigure(surface) {
  const shape = layout("step along the first direction", "step along the second direction");
  if (!surface) return [[], shape];
  const grid = surface.grid.map((row) => row.map((loss) => Math.log10(Math.max(loss, 1e-3))));
  const ticks = [0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100];
  return [[{
    type: "contour", x: surface.step, y: surface.step, z: grid, colorscale: "Viridis", ncontours: 16,
    customdata: surface.grid, line: { width: 0.5, color: "rgba(255,255,255,0.5)" },
    colorbar: {
      title: { text: "RLoss" }, tickvals: ticks.map(Math.log10), ticktext: ticks, outlinewidth: 0,
    },
    hovertemplate: "(%{x:.2f}, %{y:.2f}): RLoss %{customdata:.3g}<extra></extra>",
  }], shape];
}
